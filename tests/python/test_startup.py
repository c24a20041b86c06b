"""What importing the package and the first call load: nothing that takes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PRELUDE = """
import json, os, sys
import torch
q, k, v = (torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3))
# backward with a given gradient makes torch import sympy, whoever asks for it
torch.nn.functional.scaled_dot_product_attention(q, k, v).backward(torch.ones_like(q))
loaded = set(sys.modules)
def report():
    print(json.dumps(sorted(set(sys.modules) - loaded)))
"""
# Imports of a tenth of a second and more, which some integration or helper of the package needs.
SLOW = {
    "einops",
    "hypothesis",
    "matplotlib",
    "networkx",
    "numpy.testing",
    "pandas",
    "setuptools",
    "sympy",
    "torch._dynamo.convert_frame",
    "torch._export",
    "torch._inductor",
    "torch._inductor.compile_fx",
    "transformers",
    "triton",
}


def new_modules(program: str, **environment: str) -> set[str]:
    """Names of the modules that ``program`` adds to those of the prelude."""
    finished = subprocess.run(
        [sys.executable, "-c", PRELUDE + program + "report()"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stdout))


def test_import_loads_nothing_slow():
    modules = new_modules("import flash_attn\n")
    assert "flash_attn._library" in modules
    assert not modules & SLOW


def test_first_calls_import_nothing():
    """Whatever they need is there after the import."""
    program = """
import flash_attn
loaded = set(sys.modules)
cu = torch.tensor([0, 8], dtype=torch.int32)
flash_attn.flash_attn_func(q, k, v, causal=True).backward(torch.ones_like(q))
flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 8, 8).sum().backward()
flash_attn.flash_attn_with_kvcache(q.detach(), k.detach(), v.detach())
"""
    assert new_modules(program) == set()


def test_import_compiles_nothing_for_an_older_torch(tmp_path):
    """torch before 2.10 has no C exchange of DLPack; tvm_ffi would compile one."""
    program = """
for owner in (torch.Tensor, torch.nn.Parameter):
    if "__dlpack_c_exchange_api__" in vars(owner):
        del owner.__dlpack_c_exchange_api__
assert not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
import subprocess
started = []
def refuse(*arguments, **options):
    started.append(arguments)
    raise OSError("no processes here")
subprocess.Popen = subprocess.run = refuse
import flash_attn
assert not started
assert "TVM_FFI_DISABLE_TORCH_C_DLPACK" not in os.environ
out = flash_attn.flash_attn_func(q, k, v)
out.sum().backward()
heads_first = (x.transpose(1, 2) for x in (q, k, v))
expected = torch.nn.functional.scaled_dot_product_attention(*heads_first)
torch.testing.assert_close(out, expected.transpose(1, 2))
"""
    modules = new_modules(program, TVM_FFI_CACHE_DIR=str(tmp_path))
    assert "flash_attn" in modules
    assert not list(tmp_path.iterdir())
