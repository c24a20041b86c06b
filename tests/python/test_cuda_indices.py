"""Index tensors on the device, which the host cannot check: no kernel follows an element that is
out of range, and the next call says so."""

from __future__ import annotations

import pytest
from backends import needs_emulator
from scripts import report_of_emulated_driver
from unchecked_indices import OVERLAPPING, cases
from unchecked_indices import __file__ as SCRIPT

pytestmark = needs_emulator


@pytest.fixture(scope="module")
def report():
    return report_of_emulated_driver(SCRIPT)


@pytest.mark.parametrize("name", cases())
def test_element_out_of_range(report, name):
    """The call does what it can, without an access outside; the next one raises, names the tensor
    and does nothing; the one after that is served."""
    tensor = cases()[name][1]
    first, second, third = report[name]["calls"]
    assert first == [0, ""]
    status, sentence = second
    assert status == 1
    assert sentence.startswith(
        f"an earlier call on CUDA device 0 was given values out of range in {tensor}: "
    )
    assert third == [0, ""]
    assert report[name]["wrong"] == []


def test_sequences_that_overlap(report):
    """cu_seqlens_q falls and rises: rows of two sequences are one's or the other's."""
    first, second = report["overlapping"]
    assert first == [0, ""]
    assert second[0] == 1
    assert "in cu_seqlens_q: " in second[1]


@pytest.mark.parametrize(("tensor", "entries"), OVERLAPPING)
def test_sequences_that_overlap_in_the_backward(report, tensor, entries):
    """No CTA waits for one that does not come."""
    first, second = report[f"overlapping_bwd-{tensor}={entries}"]
    assert first == [0, ""]
    assert second[0] == 1
    assert f"in {tensor}: " in second[1]
