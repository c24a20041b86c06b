"""What tools/kernel_table.py reads in the kernels' machine code."""

from __future__ import annotations

import re
import struct
import sys
import sysconfig

import pytest
from backends import needs_kernels
from scripts import ROOT, forget_modules

from flash_attn import _library

TOOLS = ROOT / "tools"
# Shortened from nvdisasm's output: a loop around the products with branches around the copies, a
# mask, a rare subtraction and the products, and a wait that is a loop of its own.
LOOP = (ROOT / "tests" / "python" / "data" / "loop.sass").read_text()


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import sass

    yield sass
    forget_modules(TOOLS)


@pytest.fixture
def sm_pipes(sass):
    import sm_pipes

    return sm_pipes


@pytest.fixture
def no_nvdisasm(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for variable in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))


def fatbin(*entries):
    """A fatbin of (kind, flags, content)."""
    body = b""
    for kind, flags, content in entries:
        head = struct.pack("<HHIQ", kind, 0x101, 64, len(content)) + bytes(24)
        body += head + struct.pack("<Q", flags) + bytes(16) + content
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_the_inner_loop_is_the_one_around_the_products(sass):
    kernel, combine = sass.parse(LOOP)
    assert (kernel.name, combine.name) == ("flash_fwd_sm80_fp16_d64_none", "combine")
    assert len(kernel.loops()) == 4
    (loop,) = kernel.inner_loops(frozenset({"HMMA"}))
    assert kernel.blocks[loop.head][0].opcode == "IADD3"
    inside = [line.opcode for block in loop.blocks for line in kernel.blocks[block]]
    assert inside.count("HMMA.16816.F32") == 3
    assert not {"EXIT", "STG.E.128", "LOP3.LUT"} & set(inside)
    assert len(combine.loops()) == 1
    assert combine.inner_loops(frozenset({"HMMA"})) == []


def test_an_outer_loop_is_not_the_inner_one(sass):
    """Of a persistent kernel's loop over tiles and the loop over keys in it, the latter."""
    tiles = LOOP.replace("@P0 EXIT", "@P0 BRA `(.L_x_0)")
    kernel, _ = sass.parse(tiles)
    (loop,) = kernel.inner_loops(frozenset({"HMMA"}))
    assert len(kernel.loops()) == 5
    assert kernel.blocks[loop.head][0].opcode == "IADD3"


def test_instructions_of_a_trip(sass, sm_pipes):
    """Counted by hand: all products and copies, no rare subtraction, the mask where it is asked."""
    kernel, combine = sass.parse(LOOP)
    trips = dict(sm_pipes.trips(kernel))
    counts = {"tensor": 3, "MUFU": 1, "FMA": 2, "ALU": 5, "LSU": 6, "uniform": 1, "moves": 2}
    assert trips["full"].counts == {**counts, "others": 14}
    assert trips["masked"].counts == {**counts, "ALU": 5 + 4, "others": 14}
    assert list(sm_pipes.trips(combine)) == []


def test_cycles_of_a_trip(sass, sm_pipes):
    """The load/store pipe: a copy and three ldmatrix of 512 bytes, a shuffle and a load of 128."""
    kernel, _ = sass.parse(LOOP)
    full = dict(sm_pipes.trips(kernel))["full"]
    ampere = {"issue": 34, "tensor": 24, "MUFU": 8, "FMA": 6, "ALU": 10, "LSU": (4 * 4 + 2) * 4}
    assert full.cycles("8.0") == ampere
    assert full.cycles("9.0") == {**ampere, "tensor": 12, "FMA": 3}
    assert sm_pipes.bound(full.cycles("8.0")) == "LSU 72, 33%"


@pytest.mark.parametrize("opcode", ["HMMA.1688.F32", "HGMMA.64x128x8.F32.TF32", "TEX.LL"])
def test_an_unknown_instruction_is_no_guess(sass, sm_pipes, opcode):
    kernel, _ = sass.parse(LOOP.replace("MUFU.EX2", opcode))
    with pytest.raises(ValueError, match=re.escape(opcode)):
        list(sm_pipes.trips(kernel))


def test_an_indirect_jump_is_no_guess(sass):
    with pytest.raises(ValueError, match="BRX"):
        sass.parse(LOOP.replace("BRA.DIV ~URZ, `(.L_x_33)", "BRX R2 -0x10"))


def test_machine_code_in_fatbins(sass):
    one, other = fatbin((1, 0x11, b"ptx"), (2, 0x11, b"cubin")), fatbin((2, 0x11, b"other"))
    library = b"\x7fELF" + one + bytes(5) + one[:4] + bytes(64) + other
    assert list(sass.cubins(library)) == [b"cubin", b"other"]
    with pytest.raises(ValueError, match="compressed"):
        list(sass.cubins(fatbin((2, 0x2011, b"cubin"))))


def test_without_nvdisasm_the_tool_says_so(sass, no_nvdisasm, monkeypatch, tmp_path, capsys):
    import kernel_table

    (tmp_path / "kernels.csv").write_text("kernel\nk\n")
    (tmp_path / "k.fatbin").write_bytes(fatbin((2, 0x11, b"cubin")))
    arguments = ["kernel_table.py", str(tmp_path / "kernels.csv"), "--print", "pipes"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        kernel_table.main()
    assert stop.value.code == 1
    assert "nvdisasm is neither" in capsys.readouterr().err


@needs_kernels
def test_built_kernels(sass, sm_pipes):
    """Each has one inner loop, whose products fit its exponentials, and in which the pipe that
    docs/cuda.md names is an A100's bound."""
    library = next(_library.library_path().parent.glob("libflash_attn.so*"))
    # Disassembling the others, too, would take minutes.
    cubins = [x for x in sass.cubins(library.read_bytes()) if b"flash_fwd_sm80_" in x]
    functions = [function for cubin in cubins for function in sass.disassemble(cubin)]
    kernels = [function for function in functions if function.name.startswith("flash_fwd_sm80_")]
    assert kernels
    for kernel in kernels:
        (full, full_trip), (masked, masked_trip) = sm_pipes.trips(kernel)
        assert (full, masked) == ("full", "masked")
        head_dim, head_dim_v = re.search(r"_d(\d+)(?:x(\d+))?_", kernel.name).groups()
        head_dim, head_dim_v = int(head_dim), int(head_dim_v or head_dim)
        rows = 4 if head_dim <= 128 else 2  # of a lane: one exponential each, to rescale
        scores = full_trip.counts["MUFU"] - rows
        assert full_trip.counts["tensor"] == scores * (head_dim + head_dim_v) / 64
        assert masked_trip.counts["tensor"] == full_trip.counts["tensor"]
        assert masked_trip.counts["ALU"] >= full_trip.counts["ALU"] + scores
        assert sum(full_trip.counts.values()) == full_trip.cycles("8.0")["issue"]
        bound = "tensor" if 32 < head_dim <= 128 else "LSU" if head_dim > 128 else "issue"
        assert sm_pipes.bound(full_trip.cycles("8.0")).startswith(bound + " "), kernel.name
