"""What the tools read in the sm_90a kernels' machine code, and the model of their speed."""

from __future__ import annotations

import pytest
from backends import needs_kernels
from scripts import ROOT, forget_modules

from flash_attn import _library

TOOLS = ROOT / "tools"
# Made up: a loop over blocks that a mask cuts, in which references may rise, a wait, and a loop
# over blocks that every query sees.
KERNEL = (ROOT / "tests" / "python" / "data" / "warpgroups.sass").read_text()


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import sass

    yield sass
    forget_modules(TOOLS)


@pytest.fixture
def warpgroups(sass):
    import warpgroups

    return warpgroups


@pytest.fixture
def schedule(sass):
    import warp_schedule

    return warp_schedule


def run(schedule, *programs):
    """The cycles until warps with these programs are done, and the pipes' busy cycles."""
    sub_partition = schedule.SubPartition(list(programs))
    return sub_partition.run(), sub_partition.busy


def ops(sass, schedule, text):
    """Lines such as ``FADD R1, R1, R2``."""
    lines = [line.strip() for line in text.strip().splitlines()]
    split = [line.partition(" ") for line in lines]
    return [schedule.decode(sass.Instruction("", opcode, rest)) for opcode, _, rest in split]


def test_loops_are_told_apart(sass, warpgroups):
    (function,) = sass.parse(KERNEL)
    kernel = warpgroups.read(function)
    assert (kernel.n, kernel.head_dim, kernel.head_dim_v) == (32, 64, 64)
    assert (kernel.registers, kernel.warpgroups, kernel.m) == (240, 2, 128)
    roots = [[line.root for line in lines] for lines in (kernel.full, kernel.cut)]
    assert [lines.count("HGMMA") for lines in roots] == [6, 6]
    assert [lines.count("FSEL") for lines in roots] == [0, 8]
    assert warpgroups.overlap(kernel.full)


def test_one_loop_may_do_for_both(sass, warpgroups):
    one = KERNEL.split(".L_x_2:")[0] + "        /*0130*/                   EXIT ;\n"
    kernel = warpgroups.read(sass.parse(one)[0])
    counts = [[line.root for line in lines].count("FSEL") for lines in (kernel.full, kernel.cut)]
    assert counts == [0, 8]
    assert not warpgroups.overlap(kernel.full)


def test_cycles_of_wgmma(sass, warpgroups):
    """m64nNk16 is N / 2 cycles of the four tensor cores: 64 * N * 16 * 2 operations at 4096."""
    import sm_pipes

    kernel = warpgroups.read(sass.parse(KERNEL)[0])
    full = sm_pipes.trip(kernel.full)
    assert full.counts["tensor"] == 6
    assert full.cycles("9.0")["tensor"] == 4 * 32 // 2 + 2 * 64 // 2 == kernel.products
    # Q K^T reads 64 + 32 rows of 32 bytes four times, P V 64 rows twice; copies write 64 rows of
    # 128 bytes for both warpgroups.
    assert warpgroups.shared_memory(kernel) == 2 * (4 * 96 + 2 * 64) * 32 // 128 + 64
    assert kernel.copied == 32 * 128 * 2


def test_the_minimum_of_a_block(warpgroups):
    """128 keys: 64 scores a lane, of two rows."""
    assert warpgroups.minimum(128) == {"MUFU": 64, "FMA": 130, "ALU": 62 + 4 + 2 + 32 + 1}


def test_instructions_wait_for_registers(sass, schedule):
    chain = ops(sass, schedule, "FADD R1, R1, R2\n" * 10)
    end, busy = run(schedule, chain)
    assert (end, busy["FMA"]) == (9 * schedule.LATENCIES["FMA"] + 1, 10)
    apart = ops(sass, schedule, "\n".join(f"FADD R{i}, R{i}, R99" for i in range(10)))
    assert run(schedule, apart)[0] == 10


def test_a_pipe_takes_one_at_a_time(sass, schedule):
    powers = ops(sass, schedule, "\n".join(f"MUFU.EX2 R{i}, R{i}" for i in range(32)))
    for warps in (1, 2):
        end, busy = run(schedule, *[powers] * warps)
        assert busy["MUFU"] == 8 * 32 * warps
        # The last ones lie in the queue when all have been issued.
        assert 0 <= busy["MUFU"] - 8 - end < 8 * (schedule.QUEUE + 1)


def test_products_run_beside_others(sass, schedule):
    product = "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0\n"
    waits = ops(sass, schedule, product * 4 + "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    end, busy = run(schedule, waits)
    assert busy["tensor"] == 4 * 64 == end
    # The wait for all but the last group ends with the third.
    after = ops(sass, schedule, "FADD R1, R1, R2\n" * 8)
    end, _ = run(schedule, waits + after)
    assert end == max(256, 3 * 64 + schedule.PRODUCT_LATENCY + 7 * schedule.LATENCIES["FMA"] + 2)


def test_turns_exclude_each_other(sass, schedule):
    powers = "\n".join(f"MUFU.EX2 R{i}, R{i}" for i in range(16))
    turn = f"BAR.SYNC.DEFER_BLOCKING R20, 0x100\n{powers}\nFADD R15, R15, R15\nBAR.ARV R21, 0x100\n"
    one, _ = run(schedule, ops(sass, schedule, turn))
    three, _ = run(schedule, *[ops(sass, schedule, turn)] * 3)
    assert 2.9 * one < three < 3.5 * one
    never = ops(sass, schedule, "BAR.SYNC.DEFER_BLOCKING R20, 0x100\nFADD R1, R1, R2")
    with pytest.raises(ValueError, match="no warp's turn"):
        run(schedule, never, never)


def test_warpgroups_fill_each_others_gaps(sass, warpgroups):
    """Two of them keep the tensor core busier than one, and none busier than it can be."""
    kernel = warpgroups.read(sass.parse(KERNEL)[0])
    alone = warpgroups.speed(kernel._replace(registers=504))
    both = warpgroups.speed(kernel)
    assert alone.full > kernel.products
    assert 2 * kernel.products <= both.full < 2 * alone.full
    assert both.cut > 0
    assert both.tile > 0


def test_operations_per_second(sass, warpgroups):
    """Loops that took no longer than their products would reach the peak, but for whole tiles."""
    kernel = warpgroups.read(sass.parse(KERNEL)[0])
    ideal = warpgroups.Speed(0, 2 * kernel.products, 2 * kernel.products)
    heads = warpgroups.SMS  # whose tiles are the same number for each SM
    full = warpgroups.teraflops(kernel, ideal, 4096, heads, False)
    assert full == pytest.approx(warpgroups.PEAK)
    # Of 32 tiles of 128 queries, tile i sees 4 i + 4 blocks of 32 keys, all of them to the end.
    causal = warpgroups.teraflops(kernel, ideal, 4096, heads, True)
    assert causal == pytest.approx(full * (32 * 32 / 2) / sum(range(1, 33)))
    few = warpgroups.teraflops(kernel, ideal, 4096, 1, False)
    assert few == pytest.approx(warpgroups.PEAK * 32 / warpgroups.SMS)


def test_the_tile_table_is_read(sass):
    import hopper_table

    table = hopper_table.tile_table()
    assert table[128, 128, "masked"]["n"] == "128"
    assert table[128, 128, "unmasked"]["cluster"] == "2"
    assert table[128, 128, "masked"]["cluster"] == "1"
    assert table[256, 256, "modified"]["o_apart"] == "false"
    fp8 = hopper_table.tile_table("kFp8Tiles")
    assert fp8[256, 256, "masked"]["pv_columns"] == "64"
    for tile in [*table.values(), *fp8.values()]:
        assert tile["overlap"].startswith("Overlap::k")


@needs_kernels
def test_built_kernels(sass, warpgroups):
    """Every instruction has a pipe. Products are no more than a block needs. Above d = 96 the
    tensor pipe is the longest; at d = 128 it is busy for 85 % of the time at least, and what a
    block takes of the others is within 1.15 times the fewest instructions that can do it. In fp8,
    whose products take half as long, it is busy for 70 %."""
    import sm_pipes

    library = next(_library.library_path().parent.glob("libflash_attn.so*"))
    prefix = warpgroups.PREFIX.encode()
    cubins = [cubin for cubin in sass.cubins(library.read_bytes()) if prefix in cubin]
    functions = [function for cubin in cubins for function in sass.disassemble(cubin)]
    assert functions
    for function in functions:
        for block in function.blocks:
            assert sum(sm_pipes.trip(block).counts.values()) == len(block)
        kernel = warpgroups.read(function)
        cycles = sm_pipes.trip(kernel.full).cycles("9.0")
        assert cycles["tensor"] == kernel.products, kernel.name
        assert sm_pipes.trip(kernel.cut).cycles("9.0")["tensor"] == kernel.products, kernel.name
        if kernel.head_dim >= 128:
            assert max(cycles, key=cycles.get) == "tensor", kernel.name
        is_fp8 = kernel.element_bytes == 1
        if kernel.head_dim == 128 and not kernel.name.endswith("_modified"):
            busy = kernel.warpgroups * kernel.products / warpgroups.full_block(kernel)
            assert busy >= (0.7 if is_fp8 else 0.85), kernel.name
        if kernel.head_dim == 128 and not is_fp8 and not kernel.name.endswith("_modified"):
            assert max(warpgroups.surplus(kernel).values()) <= 1.15, warpgroups.surplus(kernel)
