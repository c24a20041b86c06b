#!/usr/bin/env bash
# Builds the wheel in an isolated environment without torch, with PyPI's nvcc (or what FLASH_ATTN_CUDA says) and without
# libzstd, and checks its tag, its files and how its libraries find each other; then loads it in a virtual environment
# that has nothing but the wheel and apache-tvm-ffi, and runs a CUDA kernel of it on the emulated GPU, with .venv's torch.
# FLASH_ATTN_FATBINS: a folder with the kernels of a build that is up to date; nvcc then compiles none.
set -euo pipefail
cd "$(dirname "$0")/.."

export FLASH_ATTN_CUDA=${FLASH_ATTN_CUDA:-PYPI}
PATH=${PATH#"$PWD/.venv/bin:"}  # no help from the tools of the virtual environment
rm -rf build/wheel
.venv/bin/python -m venv build/wheel/venv
pip=(build/wheel/venv/bin/pip --disable-pip-version-check -qq)
settings=(--config-settings=cmake.define.GPU_EMULATOR_ZSTD=OFF
          --config-settings=cmake.define.FLASH_ATTN_FATBINS="${FLASH_ATTN_FATBINS:-}")
"${pip[@]}" wheel --no-deps -w build/wheel "${settings[@]}" .
wheel=$(echo build/wheel/*.whl)
[[ $wheel == *-py3-none-linux_*.whl ]] || { echo "unexpected tag: $wheel" >&2; exit 1; }

"${pip[@]}" install 'apache-tvm-ffi>=0.1.15'
"${pip[@]}" install --no-deps "$wheel"
site=$(realpath "$(build/wheel/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')")
for file in flash_attn/{__init__.py,libflash_attn.so.2,libflash_attn_ffi.so,libgpu_emulator.so} flash_attn_2_cuda.py; do
  [[ -f $site/$file ]] || { echo "the wheel lacks $file" >&2; exit 1; }
done
needed=$(readelf -d "$site"/flash_attn/*.so*)
if grep -E 'NEEDED.*(python|torch|c10|zstd)' <<<"$needed"; then
  echo "the libraries must not need Python, torch or zstd" >&2
  exit 1
fi
grep -q 'NEEDED.*libgomp.so.1' <<<"$needed"
grep -q 'RUNPATH.*\[$ORIGIN\]' <<<"$needed"
build/wheel/venv/bin/python - "$site" <<'PYTHON'
import sys

import tvm_ffi

library = tvm_ffi.load_module(f"{sys.argv[1]}/flash_attn/libflash_attn_ffi.so")
isas = library["cpu_isas"]()
print("wheel loads without torch: version", library["version"](), "with", isas)
software = {"wide16", "soft_dot", "soft_tiles"} & set(isas.split())
assert not software, f"instruction sets of tests are in the wheel: {software}"
PYTHON

if ! grep -q 'zstd, which this build of the emulator lacks' "$site/flash_attn/libgpu_emulator.so"; then
  echo "the emulated GPU was built with libzstd" >&2
  exit 1
fi
# From another folder: in this one the package is that of the sources.
python=$PWD/.venv/bin/python
cd build/wheel
PYTHONPATH=$site "$python" - "$site" <<'PYTHON'
import sys

import flash_attn
import torch

assert flash_attn.__file__.startswith(sys.argv[1]), flash_attn.__file__
q, k, v = torch.randn(3, 1, 130, 2, 64).half()
with flash_attn.emulator() as gpu:
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
assert list(gpu.counters) == ["flash_fwd_sm80_fp16_d64_masked"], gpu.counters
heads_first = (x.double().transpose(1, 2) for x in (q, k, v))
expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=0, atol=2e-3)
print("its CUDA kernel runs on the emulated GPU, without libzstd")
PYTHON
