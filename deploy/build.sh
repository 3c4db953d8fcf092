#!/usr/bin/env bash
# Configures and builds: build.sh PRESET [TARGET]. As many compilers at once as there are cores and 2 GiB of memory each.
set -euo pipefail

preset=${1:?usage: build.sh PRESET [TARGET]}
target=${2:-all}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

available_gib=$(awk '/^MemAvailable:/ {print int($2 / 1048576)}' /proc/meminfo)
jobs=$((available_gib / 2 < $(nproc) ? available_gib / 2 : $(nproc)))
if ((jobs < 1)); then jobs=1; fi
# Another clone of the same sources hits the compiler cache too.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=true

echo "== Build $preset, $jobs jobs"
mkdir -p build
if ! cmake --preset "$preset" >"build/$preset.log" 2>&1; then
  cat "build/$preset.log" >&2
  exit 1
fi
cmake --build "build/$preset" --parallel "$jobs" --target "$target"
