#!/usr/bin/env bash
# Builds the wheel in an isolated environment without torch, and checks its tag, its files and how its libraries find
# each other; then loads it in a virtual environment that has nothing but the wheel and apache-tvm-ffi.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=${PATH#"$PWD/.venv/bin:"}  # no help from the tools of the virtual environment
rm -rf build/wheel
.venv/bin/python -m venv build/wheel/venv
pip=(build/wheel/venv/bin/pip --disable-pip-version-check -qq)
"${pip[@]}" wheel --no-deps -w build/wheel .
wheel=$(echo build/wheel/*.whl)
[[ $wheel == *-py3-none-linux_*.whl ]] || { echo "unexpected tag: $wheel" >&2; exit 1; }

"${pip[@]}" install 'apache-tvm-ffi>=0.1.15'
"${pip[@]}" install --no-deps "$wheel"
site=$(build/wheel/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
for file in flash_attn/{__init__.py,libflash_attn.so.2,libflash_attn_ffi.so} flash_attn_2_cuda.py; do
  [[ -f $site/$file ]] || { echo "the wheel lacks $file" >&2; exit 1; }
done
needed=$(readelf -d "$site"/flash_attn/*.so*)
if grep -E 'NEEDED.*(python|torch|c10)' <<<"$needed"; then
  echo "the libraries must not need Python or torch" >&2
  exit 1
fi
grep -q 'NEEDED.*libgomp.so.1' <<<"$needed"
grep -q 'RUNPATH.*\[$ORIGIN\]' <<<"$needed"
build/wheel/venv/bin/python - "$site" <<'PYTHON'
import sys

import tvm_ffi

library = tvm_ffi.load_module(f"{sys.argv[1]}/flash_attn/libflash_attn_ffi.so")
print("wheel loads without torch: version", library["version"](), "with", library["cpu_isas"]())
PYTHON
