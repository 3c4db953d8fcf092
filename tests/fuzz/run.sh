#!/usr/bin/env bash
# Fuzzes: run.sh [SECONDS a target, 300 by default] [TARGET...]. Needs clang and its libFuzzer (Debian: clang, libclang-rt).
# New inputs are kept under build/fuzz/corpus; a finding ends the run and is left in build/fuzz.
set -euo pipefail

seconds=${1:-300}
shift || true
targets=("$@")
if ((${#targets[@]} == 0)); then targets=(json_request chat_messages tokenizer_json safetensors); fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

deploy/build.sh fuzz tests/fuzz/all
for target in "${targets[@]}"; do
  echo "== $target, $seconds s"
  mkdir -p "build/fuzz/corpus/$target"
  (cd build/fuzz && UBSAN_OPTIONS=print_stacktrace=1 "tests/fuzz/fuzz_$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 \
    -print_final_stats=1 "corpus/$target" "../../tests/fuzz/corpus/$target" 2>&1 | grep -vE "^#[0-9]+\s+(NEW|REDUCE|pulse)")
done
