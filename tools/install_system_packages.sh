#!/usr/bin/env bash
# Installs what the build needs from the system, where that is missing and may be installed: a C++ compiler and Python's
# venv module. What it can do without is tried and no more: GoogleTest (CMake downloads it), and libzstd, with which the
# emulated GPU reads the fatbins of others; ours are compressed with LZ4.
set -euo pipefail

required=() optional=()
command -v g++ >/dev/null || required+=(g++)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || required+=(python3-venv)
has_header() { [[ -e /usr/include/$1 || -e /usr/local/include/$1 ]]; }
has_header gtest/gtest.h || optional+=(libgtest-dev)
has_header zstd.h || optional+=(libzstd-dev)

may_install=
if ((EUID == 0)) && command -v apt-get >/dev/null; then may_install=1; fi
install() {
  [[ $may_install ]] || return 1
  apt-get update -q || true
  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
}

if ((${#required[@]})) && ! install "${required[@]}"; then
  echo "Please install: ${required[*]} ${optional[*]} (their names in Debian)" >&2
  exit 1
fi
if ((${#optional[@]})) && ! install "${optional[@]}"; then
  echo "Going on without ${optional[*]}" >&2
fi
