"""CUDA graphs on the emulated GPU: what was captured once follows lengths and pages that change."""

from __future__ import annotations

import captured_calls
import pytest
from backends import needs_emulator
from scripts import report_of_emulated_driver
from unchecked_indices import CALLS

pytestmark = needs_emulator


@pytest.fixture(scope="module")
def report():
    return report_of_emulated_driver(captured_calls.__file__)


@pytest.mark.parametrize("name", CALLS)
def test_replays_give_what_eager_calls_give(report, name):
    """Bitwise, for the contents at the time of each replay; a capture alone does nothing."""
    assert report[name] == []
