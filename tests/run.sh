#!/usr/bin/env bash
# Runs every test: installs what is missing, builds, then CTest and, on the release build, the end-to-end tests.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: tests/run.sh [--preset release|debug|asan|tsan]... [--all] [-R REGEX] [-k EXPRESSION]
  --preset NAME   a build to test; may be repeated (default: release)
  --all           release, asan and tsan
  -R REGEX        of CTest's tests only those whose name matches, and no end-to-end tests unless -k is given too
  -k EXPRESSION   of the end-to-end tests only those that pytest selects, and none of CTest's unless -R is given too
EOF
}

presets=()
ctest_filter=""
pytest_filter=""
while (($# > 0)); do
  case "$1" in
    --all) presets=(release asan tsan) ;;
    --preset | -R | -k)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      case "$1" in
        --preset) presets+=("$2") ;;
        -R) ctest_filter=$2 ;;
        -k) pytest_filter=$2 ;;
      esac
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done
if ((${#presets[@]} == 0)); then presets=(release); fi
run_ctest=true
run_pytest=true
if [[ -n $ctest_filter && -z $pytest_filter ]]; then run_pytest=false; fi
if [[ -n $pytest_filter && -z $ctest_filter ]]; then run_ctest=false; fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_venv() {
  local stamp=build/venv/requirements.sha256
  if [[ -f $stamp ]] && build/venv/bin/python -c "" 2>/dev/null && sha256sum --check --status "$stamp"; then return; fi
  echo "== Python packages"
  rm -rf build/venv
  python3 -m venv build/venv
  build/venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt
  sha256sum tests/requirements.txt >"$stamp"
}

passed=0
failed=0
skipped=0

# add_results NAME EXIT_CODE JUNIT_FILE: adds a run's counts to the totals; a run that failed without saying so is a failure.
add_results() {
  local suite="" total failures errors skips
  if [[ -f $3 ]]; then suite=$(tr '\n\t' '  ' <"$3" | grep -o '<testsuite [^>]*>' || true); fi
  total=$(count_of tests "$suite")
  failures=$(count_of failures "$suite")
  errors=$(count_of errors "$suite")
  skips=$(($(count_of skipped "$suite") + $(count_of disabled "$suite")))
  failures=$((failures + errors))
  passed=$((passed + total - failures - skips))
  skipped=$((skipped + skips))
  if (($2 != 0 && failures == 0)); then
    echo "$1 exited with code $2" >&2
    failures=1
  fi
  failed=$((failed + failures))
}

count_of() {
  local match
  match=$(grep -o " $1=\"[0-9]*\"" <<<"$2" || true)
  tr -dc 0-9 <<<"${match:-0}"
}

# The thread sanitizer looks at the threads there are: the engine's and the front end's.
folders_of() {
  case "$1" in
    tsan) echo tests/engine tests/server ;;
    *) echo . ;;
  esac
}

build_and_test() {
  local preset=$1 folder status junit no_tests=error
  if [[ -n $ctest_filter ]]; then no_tests=ignore; fi  # of one folder, that is: the end of this file minds
  for folder in $(folders_of "$preset"); do
    if [[ $folder == . ]]; then
      deploy/build.sh "$preset" all
    else
      deploy/build.sh "$preset" "$folder/all"
    fi
  done
  if ! $run_ctest; then return; fi
  for folder in $(folders_of "$preset"); do
    echo "== CTest $preset${folder#.}"
    status=0
    junit=$PWD/build/$preset/ctest.xml
    rm -f "$junit"
    ctest --test-dir "build/$preset/$folder" --parallel "$(nproc)" --output-on-failure "--no-tests=$no_tests" --timeout 600 \
      --output-junit "$junit" ${ctest_filter:+-R "$ctest_filter"} || status=$?
    add_results "CTest $preset" "$status" "$junit"
  done
}

end_to_end() {
  local status=0 junit=build/release/pytest.xml
  echo "== End to end"
  rm -f "$junit"
  timeout --kill-after=10 1800 build/venv/bin/python -m pytest tests/e2e -p no:cacheprovider --junitxml="$junit" \
    --binary build/release/cachalot --checkpoint tests/golden/data/v3_like ${pytest_filter:+-k "$pytest_filter"} ||
    status=$?
  add_results "pytest" "$status" "$junit"
}

deploy/install_deps.sh --tests
make_venv
for preset in "${presets[@]}"; do
  build_and_test "$preset"
  if [[ $preset == release ]] && $run_pytest; then end_to_end; fi
done

echo
if ((passed + failed == 0)); then echo "No test ran." >&2; fi
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0 && passed > 0))
