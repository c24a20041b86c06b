#!/usr/bin/env bash
# Installs what the build needs from the system, where that is missing and may be installed: a C++ compiler, Python's
# venv module, GoogleTest (without it, CMake downloads it), and libzstd, with which the emulated GPU reads the kernels
# that nvcc compressed.
set -euo pipefail

missing=()
command -v g++ >/dev/null || missing+=(g++)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
for header in /usr/include /usr/local/include; do
  [[ -e $header/gtest/gtest.h ]] && gtest=1
  [[ -e $header/zstd.h ]] && zstd=1
done
[[ ${gtest:-} ]] || missing+=(libgtest-dev)
[[ ${zstd:-} ]] || missing+=(libzstd-dev)

((${#missing[@]})) || exit 0
required=()
for package in "${missing[@]}"; do
  [[ $package == lib* ]] || required+=("$package")
done
if ((EUID == 0)) && command -v apt-get >/dev/null; then
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
elif ((${#required[@]})); then
  echo "Please install: ${missing[*]} (their names in Debian)" >&2
  exit 1
fi
