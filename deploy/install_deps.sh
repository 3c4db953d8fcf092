#!/usr/bin/env bash
# Installs what building Cachalot needs (with --tests also what its tests need); does nothing when all of it is there.
set -euo pipefail

packages=(
  g++ cmake ninja-build ccache pkg-config git
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev libspdlog-dev libfmt-dev
  libboost-dev libssl-dev zlib1g-dev libc-ares-dev libre2-dev libcli11-dev nlohmann-json3-dev libtomlplusplus-dev libpcre2-dev libhwy-dev
  libgtest-dev libgmock-dev
  python3 python3-venv
)
case "${1:-}" in
  "") ;;
  --tests) packages+=(clang-format-14 shellcheck) ;;
  *)
    echo "usage: ${0##*/} [--tests]" >&2
    exit 2
    ;;
esac

system=unknown
if [[ -r /etc/os-release ]]; then
  # shellcheck source=/dev/null
  system=$(. /etc/os-release && echo "${ID:-} ${VERSION_ID:-}")
fi
if [[ $system != "debian 12" && $system != "ubuntu 24.04" ]]; then
  echo "Cachalot installs its dependencies on Debian 12 and Ubuntu 24.04 only. Going on with what is here; where" \
    "something is missing, install your system's counterparts of these Debian packages: ${packages[*]}" >&2
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true) == installed ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then exit 0; fi

echo "Installing ${missing[*]}" >&2
as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "Neither root nor sudo: have somebody run 'apt-get install ${missing[*]}' first." >&2
    exit 1
  fi
  as_root=(sudo)
fi
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
"${apt[@]}" update
"${apt[@]}" install --yes --no-install-recommends "${missing[@]}" >/dev/null
