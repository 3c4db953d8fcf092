#!/usr/bin/env bash
# Installs what is missing, builds Cachalot and serves a model: a small random one, or yours with --model DIR.
# Every argument goes on to `cachalot serve`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
host=127.0.0.1
port=8000
model=""
previous=""
for argument in "$@"; do
  case "$previous" in
    --host) host=$argument ;;
    --port) port=$argument ;;
    --model) model=$argument ;;
  esac
  case "$argument" in
    --host=*) host=${argument#*=} ;;
    --port=*) port=${argument#*=} ;;
    --model=*) model=${argument#*=} ;;
  esac
  previous=$argument
done

"$root/deploy/install_deps.sh"
"$root/deploy/build.sh" release cachalot

if [[ -z $model ]]; then
  model=$root/build/random-checkpoint
  set -- --model "$model" "$@"
  if [[ ! -d $model ]]; then
    echo "Making a random checkpoint"
    venv=$root/build/quickstart-venv
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/tests/requirements.txt" numpy
    rm -rf "$model.partial"
    "$venv/bin/python" "$root/tests/golden/make_checkpoint.py" --out "$model.partial" --preset tiny
    mv "$model.partial" "$model"
  fi
  echo
  echo "This model's weights are random: it answers with noise. For sense, give a real checkpoint: --model DIR."
fi

cat <<EOF

When the server says that it is ready, try in another terminal:

  curl http://$host:$port/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "Once upon a time", "max_tokens": 32}'
  $root/build/release/cachalot chat --url http://$host:$port

EOF
exec "$root/build/release/cachalot" serve "$@"
