"""Calls that raise before anything is written, or return without touching what is not theirs."""

from __future__ import annotations

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_calls import MARGIN

# Calls of each entry point that a fuzz test makes.
EXAMPLES = int(os.environ.get("FLASH_ATTN_FUZZ_EXAMPLES", "60"))
# A malformed tensor or number is a RuntimeError; objects of other kinds meet Python's own errors.
ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, OverflowError, AssertionError)


def storage_bytes(t):
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def has_memory(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta


class Memory:
    """The bytes of all tensors of a call, before it."""

    def __init__(self, arguments):
        self.tensors = {name: x for name, x in arguments.items() if has_memory(x)}
        self.before = {name: storage_bytes(x).clone() for name, x in self.tensors.items()}

    def assert_unchanged(self, except_for=()):
        written = [self.tensors[name] for name in except_for if name in self.tensors]
        storages = {t.untyped_storage().data_ptr() for t in written}
        for name, t in self.tensors.items():
            if t.untyped_storage().data_ptr() not in storages:
                assert torch.equal(storage_bytes(t), self.before[name]), f"{name} was changed"

    def assert_margins_unchanged(self, names):
        """A written tensor that still has its margins: they are as they were."""
        for name in names:
            t = self.tensors.get(name)
            if t is None or t.storage_offset() != MARGIN:
                continue
            size, margin = t.element_size(), MARGIN * t.element_size()
            end = margin + t.numel() * size
            after, before = storage_bytes(t), self.before[name]
            assert torch.equal(after[:margin], before[:margin]), f"written before {name}"
            assert torch.equal(after[end:], before[end:]), f"written after {name}"


def check_call(entry, arguments, backend):
    """Makes the call; its error, if it raises."""
    memory = Memory(arguments)
    try:
        with backend.calls():
            entry.call(arguments)
    except ERRORS as error:
        assert str(error) and "CUDA_ERROR" not in str(error)  # a fault of a kernel
        memory.assert_unchanged()
        return error
    memory.assert_unchanged(except_for=entry.written)
    memory.assert_margins_unchanged(entry.written)
    return None


def for_random_calls(check, count):
    settings(max_examples=count)(given(st.randoms(use_true_random=False))(check))()
