#!/usr/bin/env bash
# Installs what is missing, builds Cachalot and serves a model: the demo checkpoint, or yours with --model DIR.
# Every argument goes on to `cachalot serve`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
host=127.0.0.1
port=8000
has_model=false
previous=""
for argument in "$@"; do
  case "$previous" in
    --host) host=$argument ;;
    --port) port=$argument ;;
  esac
  case "$argument" in
    --host=*) host=${argument#*=} ;;
    --port=*) port=${argument#*=} ;;
    --model | --model=* | --config | --config=*) has_model=true ;;
  esac
  previous=$argument
done

"$root/deploy/install_deps.sh"
"$root/deploy/build.sh" release cachalot

if ! $has_model; then
  set -- --model "$root/deploy/demo" "$@"
  echo
  echo "The demo checkpoint is a pocket dictionary (deploy/demo/README.md). For more, give a checkpoint: --model DIR."
fi

cat <<EOF

When the server says that it is ready, try in another terminal:

  curl http://$host:$port/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What kinds of whale are there?"}], "temperature": 0}'
  $root/build/release/cachalot chat --url http://$host:$port

EOF
exec "$root/build/release/cachalot" serve "$@"
