"""Environment variables: a value that cannot be meant is an error that says what can."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from backends import HAVE_KERNELS, needs_emulator
from instruction_sets import ALL_ISAS, ISAS, OF_CPUS, OPERATOR_ISAS, SOFTWARE, isas_to_test

from flash_attn import _library

ISA, PRODUCTS = "FLASH_ATTENTION_CPU_ISA", "FLASH_ATTENTION_CPU_FP32_PRODUCTS"
EMULATOR = "FLASH_ATTENTION_EMULATOR"
LACKING = [isa for isa in ALL_ISAS if isa not in _library.cpu_isas()]

C_INTERFACE = f"""
import ctypes
lib = ctypes.CDLL({str(_library.library_path().parent / "libflash_attn.so.2")!r})
text = ctypes.CFUNCTYPE(ctypes.c_char_p)
cpu_isa, emulator_counters, last_error = (
    text(("flash_attn_" + name, lib)) for name in ("cpu_isa", "emulator_counters", "last_error")
)
"""
# What the first call says, the second says too.
TWO_CALLS = """
import torch
from flash_attn import flash_attn_func
x = torch.randn(1, 8, 1, 64)
for _ in range(2):
    try:
        print(flash_attn_func(x, x, x).isfinite().all().item())
    except RuntimeError as error:
        print(error)
"""


def run(code, **environment):
    """The lines that ``code`` prints in a process with these variables and no others of ours."""
    others = {n: x for n, x in os.environ.items() if not n.startswith("FLASH_ATTENTION_")}
    command = [sys.executable, "-c", code]
    process = subprocess.run(
        command, env={**others, **environment}, capture_output=True, text=True, check=True
    )
    return process.stdout.splitlines()


def bad_values():
    here = " ".join(_library.cpu_isas())
    for value in ("avx3", "AVX2", "avx2 "):
        yield ISA, value, f'{ISA} is "{value}": it must be one of {" ".join(ALL_ISAS)}'
    for value in LACKING:
        sentence = f"which this machine or this build lacks; it has {here}"
        yield ISA, value, f'{ISA} is "{value}", {sentence}'
    for value in ("4", "three", "36"):
        yield PRODUCTS, value, f'{PRODUCTS} is "{value}": it must be 3 or 6'


@pytest.mark.parametrize(("variable", "value", "sentence"), list(bad_values()))
def test_bad_value(variable, value, sentence):
    code = "print(cpu_isa(), last_error().decode())"
    assert run(C_INTERFACE + code, **{variable: value}) == [f"None {sentence}"]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (ISA, "avx3", f'{ISA} is "avx3": it must be one of baseline avx2'),
        (PRODUCTS, "4", f'{PRODUCTS} is "4": it must be 3 or 6'),
    ],
)
def test_every_call_raises(variable, value, sentence):
    lines = run(TWO_CALLS, **{variable: value})
    assert len(lines) == 2
    assert all(line.startswith(sentence) for line in lines)


@pytest.mark.parametrize(
    ("variable", "value"),
    [(ISA, ""), (ISA, "baseline"), *((PRODUCTS, value) for value in ("", "3", "6"))],
)
def test_good_value(variable, value):
    expected = value if variable == ISA and value else _library.cpu_isas()[-1]
    code = "print(cpu_isa().decode(), last_error().decode())"
    assert run(C_INTERFACE + code, **{variable: value}) == [f"{expected} "]


@pytest.mark.parametrize("name", [isa for isa in SOFTWARE if isa in ALL_ISAS])
def test_software_is_chosen_by_its_name_alone(name):
    code = "print(cpu_isa().decode(), last_error().decode())"
    assert run(C_INTERFACE + code, **{ISA: name}) == [f"{name} "]
    assert _library.cpu_isas()[-1] in OF_CPUS


AVX2_MACHINE = ["baseline", "wide16", "soft_dot", "soft_tiles", "avx2"]


@pytest.mark.parametrize(
    ("more", "software"),
    [
        ([], ["wide16", "soft_dot", "soft_tiles"]),
        (["avx512"], ["soft_dot", "soft_tiles"]),
        (["avx512bf16", "avx512"], ["soft_tiles"]),
        (["avx512bf16", "avx512", "amx"], []),
    ],
)
def test_every_loop_is_tested_once(more, software):
    """Software where the machine lacks what it stands for, and all of it if it is to be taken for
    one with AVX2 alone."""
    available = [*AVX2_MACHINE, *more]
    assert isas_to_test(available) == ["baseline", *software, "avx2", *more]
    assert isas_to_test(available, "avx2") == AVX2_MACHINE
    assert isas_to_test(["baseline", "avx2", *more]) == ["baseline", "avx2", *more]


def test_instruction_sets_of_this_run():
    assert set(OPERATOR_ISAS) <= set(ISAS) <= set(_library.cpu_isas())
    loops = {SOFTWARE.get(isa, isa) for isa in ISAS}
    assert len(loops) == len(ISAS)
    if "wide16" in _library.cpu_isas():
        assert loops == set(OF_CPUS)


def test_an_explicit_choice_does_not_ask_the_variable():
    code = "print(lib.flash_attn_set_cpu_isa(b'baseline'), cpu_isa().decode())"
    assert run(C_INTERFACE + code, **{ISA: "avx3"}) == ["0 baseline"]


def test_report_names_a_bad_value():
    code = "from flash_attn.__main__ import report; print(report())"
    text = "\n".join(run(code, **{ISA: "avx3"}))
    assert f'{ISA} is "avx3"' in text
    assert "OpenMP: " in text


@needs_emulator
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("sm80", 'no device of architecture "sm80": sm_80, sm_86, sm_89, sm_90a and sm_120 exist'),
        (
            "sm_80,mode=lazy",
            "the emulator does not take mode=lazy: Option mode has no value 'lazy': it is eager",
        ),
        ("sm_80,late", 'option of the emulator without a value: "late"'),
        (",", 'no device of architecture ""'),
    ],
)
def test_bad_emulator(value, sentence):
    code = "print(emulator_counters(), last_error().decode())"
    (line,) = run(C_INTERFACE + code, **{EMULATOR: value})
    assert line.startswith("None ")
    assert sentence in line


@needs_emulator
def test_every_call_without_the_emulator_raises():
    lines = run(TWO_CALLS, **{EMULATOR: "sm80"})
    assert len(lines) == 2
    assert all('no device of architecture "sm80"' in line for line in lines)


@pytest.mark.skipif(HAVE_KERNELS, reason="built with CUDA kernels")
def test_emulator_without_kernels():
    lines = run(TWO_CALLS, **{EMULATOR: "sm_80"})
    assert len(lines) == 2
    assert all("no CUDA kernels (FLASH_ATTN_CUDA=PYPI pip install ." in line for line in lines)
