"""Fixtures and settings of all Python tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from instruction_sets import ISAS, OPERATOR_ISAS
from scripts import ROOT, forget_modules

from flash_attn import _library

# The same examples in every run; HYPOTHESIS_PROFILE=thorough looks further.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once on every instruction set."""
    yield from set_isa(request.param)


@pytest.fixture(params=OPERATOR_ISAS)
def operator_isa(request):
    """Runs a test of a fused operator once on every instruction set that it has loops for."""
    yield from set_isa(request.param)


def set_isa(name):
    _library.set_cpu_isa(name)
    yield name
    _library.set_cpu_isa(None)


@pytest.fixture
def demo_modules(monkeypatch):
    """Makes the demo's own modules, and those of the benchmark that it uses, importable."""
    for name in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / name))
    yield
    for name in ("benchmarks", "examples"):
        forget_modules(ROOT / name)


def pytest_collection_modifyitems(items):
    """Runs the instruction sets of one test one after another, so that they share its reference."""

    def without_isa(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        others = (str(v) for n, v in params.items() if not n.endswith("isa"))
        return item.nodeid.split("[")[0], *others

    groups = {}
    for item in items:
        groups.setdefault(without_isa(item), []).append(item)
    items[:] = [item for group in groups.values() for item in group]


@pytest.fixture
def restore_threads():
    """Lets a test change the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
