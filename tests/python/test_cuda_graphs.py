"""CUDA graphs on the emulated GPU: what was captured once follows lengths and pages that change."""

from __future__ import annotations

import captured_calls
import pytest
from backends import needs_emulator
from scripts import report_of_emulated_driver

pytestmark = needs_emulator


@pytest.fixture(scope="module")
def report():
    return report_of_emulated_driver(captured_calls.__file__)


@pytest.mark.parametrize("name", captured_calls.CALLS)
def test_replays_give_what_eager_calls_give(report, name):
    """Bitwise, for the contents at the time of each replay; a capture alone does nothing."""
    assert report[name] == []


def test_a_bad_page_of_a_replay_is_told_by_the_next_call(report):
    assert "out of range in block_table" in report["bad page"]
