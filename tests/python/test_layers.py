"""The layers of the C++ sources, as tools/check_includes.py finds them."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lint():
    spec = importlib.util.spec_from_file_location(
        "check_includes", ROOT / "tools/check_includes.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_include_points_downwards(lint):
    assert lint.check() == []


@pytest.mark.parametrize(
    "source, include",
    [
        ("csrc/base/error.h", "common/mask.h"),
        ("csrc/base/include/flash_attn/types.h", "base/error.h"),
        ("csrc/base/ptx/mma.h", "base/cuda_driver/device.h"),
        ("csrc/flash_attn/src/common/mask.h", "cpu/plan.h"),
        ("csrc/flash_attn/src/cpu/plan.h", "api/check.h"),
        ("csrc/flash_attn/src/warp/rows.h", "sm80/smem.h"),
        ("csrc/flash_attn/src/warp/rows.h", "base/cuda_driver/device.h"),
        ("csrc/flash_attn/src/sm80/smem.h", "cpu/plan.h"),
        ("csrc/ffi/flash_api.cpp", "common/flash.h"),
    ],
)
def test_an_include_that_points_upwards_is_found(lint, tmp_path, source, include):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    planted = tmp_path / source
    planted.write_text(f'#include "{include}"\n' + planted.read_text())
    (fault,) = lint.check(tmp_path)
    assert fault.startswith(source + ":") and fault.endswith("must not include " + include)


def test_unknown_files_and_folders_are_found(lint, tmp_path):
    shutil.copytree(ROOT / "csrc/base", tmp_path / "csrc/base")
    (tmp_path / "csrc/other").mkdir()
    (tmp_path / "csrc/other/x.h").write_text("")
    (tmp_path / "csrc/base/y.h").write_text('#include "nowhere.h"\n')
    assert lint.check(tmp_path) == [
        "csrc/base/y.h: no layer has nowhere.h",
        "csrc/other/x.h: its folder is not in the table of layers",
    ]
