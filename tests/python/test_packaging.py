"""What the build asks pip for."""

from __future__ import annotations

import re

import pytest
from scripts import ROOT

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
