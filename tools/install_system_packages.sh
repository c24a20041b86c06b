#!/usr/bin/env bash
# Installs what the build needs from the system, where that is missing and may be installed: a C++ compiler, Python's
# venv module and GoogleTest (without it, CMake downloads it).
set -euo pipefail

missing=()
command -v g++ >/dev/null || missing+=(g++)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
for header in /usr/include /usr/local/include; do
  [[ -e $header/gtest/gtest.h ]] && gtest=1
done
[[ ${gtest:-} ]] || missing+=(libgtest-dev)

((${#missing[@]})) || exit 0
if ((EUID == 0)) && command -v apt-get >/dev/null; then
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
elif [[ ${missing[*]} != libgtest-dev ]]; then
  echo "Please install: ${missing[*]} (their names in Debian)" >&2
  exit 1
fi
