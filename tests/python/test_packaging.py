"""What the build asks pip for, and what of it each target of the Makefile builds."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from scripts import ROOT

import flash_attn

PYPROJECT = ROOT / "pyproject.toml"
NVCC = {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime"}
OF_TESTS = {"nvidia-cuda-nvdisasm"}


@pytest.fixture(scope="module")
def pyproject():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads(PYPROJECT.read_text())


def pins(requirements):
    """Version of each package of NVIDIA's."""
    found = (re.match(r"(nvidia-[a-z-]+)==([0-9.]+)", text) for text in requirements)
    return {match[1]: match[2] for match in found if match}


def test_pip_and_make_take_the_same_nvcc(pyproject):
    (override,) = pyproject["tool"]["scikit-build"]["overrides"]
    of_pip = pins(override["build"]["requires"])  # pip resolves them on their own
    of_make = pins((ROOT / "tools" / "constraints-dev.txt").read_text().splitlines())
    assert of_make.keys() - of_pip.keys() == OF_TESTS
    assert of_pip.items() <= of_make.items()
    assert of_pip.keys() >= NVCC
    assert pins(pyproject["build-system"]["requires"]).items() <= of_pip.items()


@pytest.mark.parametrize(
    ("value", "expected"),
    [("PYPI", True), ("pypi", True), ("ON", False), ("", False), ("no-pypi", False)],
)
def test_the_switch(pyproject, value, expected):
    (override,) = pyproject["tool"]["scikit-build"]["overrides"]
    pattern = override["if"]["env"]["FLASH_ATTN_CUDA"]
    assert bool(re.search(pattern, value)) == expected


def commands_of_make(target):
    """Return what ``make target`` runs in a fresh clone, which ``make -n`` only prints."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "builds_all"),
    [("demo", False), ("bench", False), ("dev", False), ("test", True), ("lint", True)],
)
def test_make_builds_the_tests_only_for_targets_that_run_them(target, builds_all):
    builds = re.findall(r"^cmake --build build/release .*$", commands_of_make(target), re.MULTILINE)
    assert builds[0].endswith("--target flash_attn_ffi")
    assert [b for b in builds if "--target" not in b] == builds[1:]
    assert len(builds) == 1 + builds_all


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_what_make_tests_has_software_of_all_instruction_sets(pyproject):
    assert "-DFLASH_ATTN_SOFTWARE_ISAS=ON" in commands_of_make("test")
    assert "FLASH_ATTN_SOFTWARE_ISAS" not in pyproject["tool"]["scikit-build"]["cmake"]["define"]
    assert "FLASH_ATTN_SOFTWARE_ISAS" not in commands_of_make("wheel")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_pip_installs_what_make_has_built(target):
    commands = commands_of_make(target)
    pip = commands.index("--config-settings=build-dir=build/release .")
    assert all(match.start() < pip for match in re.finditer(r"cmake --build", commands))


def test_the_c_header_names_the_version():
    header = ROOT / "csrc" / "flash_attn" / "include" / "flash_attn" / "flash_attn.h"
    comment = re.search(r"flash_attn_version\(void\); /\* \"(.*)\" \*/", header.read_text())
    assert comment[1] == flash_attn.__version__
