"""Malformed calls of the fused operators raise before anything is written, or give what the same
call of plain copies of its tensors does.

Half of FLASH_ATTN_FUZZ_EXAMPLES calls (default 60) of each entry point.
"""

from __future__ import annotations

import re

import pytest
import torch
from call_checks import EXAMPLES, Memory, for_random_calls, has_memory
from malformed_calls import break_argument
from malformed_operator_calls import OPERATOR_ENTRIES
from torch.utils._pytree import tree_leaves

# What says what is wrong with a call; AttributeError and AssertionError do not.
SENTENCES = (RuntimeError, TypeError, ValueError, IndexError, OverflowError)
# Rows of results, which are allocated before the library is called.
COUNTS_OF_ROWS = ("out_numrows", "x0_numrows")

# Of arguments that the operator behind a function knows by the formula in docs/operators.md.
NAMES_OF_OPERATOR = {
    "dropout_p": "p_dropout",
    "eps": "epsilon",
    "g": "dout",
    "layerscale": "colscale",
    "norm_weight": "weight",
    "norm_bias": "bias",
    "weight0": "weight",
    "bias0": "bias",
    "x": "x0",
    "y": "x",
    "logits": "dlogits",
    "qkv": "x",
    "kv": "x",
}
# Of torch's dispatcher, about tensors for which an operator has no kernel, and of DLPack.
OF_TORCH = re.compile("Could not run 'flash_attn::|Expected Tensor but got None")
OF_DLPACK = re.compile("Cannot (pack|access)|DLPack")


def leaf(x):
    """``x`` as a tensor of its own whose gradient is wanted, where it can have one."""
    if not has_memory(x) or not x.is_floating_point() or x.dtype == torch.float8_e4m3fn:
        return x
    return x.detach().requires_grad_()


def results_of(entry, arguments, wants_gradients):
    """The tensors that a call returns and writes, and gradients of its arguments."""
    torch.manual_seed(0)  # of dropout
    if wants_gradients:
        arguments = {name: leaf(x) for name, x in arguments.items()}
    results = [x for x in tree_leaves(entry.call(arguments)) if isinstance(x, torch.Tensor)]
    results += [x for name in entry.written if has_memory(x := arguments[name])]
    recorded = [x for x in results if x.requires_grad and x.grad_fn is not None]
    if recorded:
        torch.autograd.backward(recorded, [torch.ones_like(x) for x in recorded])
        gradients = (x.grad for x in arguments.values() if isinstance(x, torch.Tensor))
        results += [x for x in gradients if x is not None]
    return [x.detach() for x in results]


def plain(x):
    """``x`` with its elements one after another in memory of its own."""
    return x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def plain_arguments(arguments):
    return {name: plain(x) if has_memory(x) else x for name, x in arguments.items()}


def assert_same(entry, results, expected):
    assert len(results) == len(expected)
    for x, y in zip(results, expected):
        bounds = {"rtol": 0.0, "atol": 0.0}
        if not entry.exact and x.is_floating_point():  # sums in another order
            bounds = dict.fromkeys(bounds, 16 * torch.finfo(x.dtype).eps)
        if not x.is_meta:
            torch.testing.assert_close(x, y, equal_nan=True, **bounds)


def is_comparable(entry, arguments):
    """A negative view has its sign elsewhere than in the memory that the library reads."""
    given = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    return not (entry.name.startswith("lib.") and any(x.is_neg() for x in given))


def check_sentence(entry, error, arguments):
    """An error is of a kind that tells something, and its sentence names an argument."""
    if entry.name.startswith("torch.ops.") and OF_TORCH.match(str(error)):
        return
    if entry.name.startswith("lib.") and OF_DLPACK.search(str(error)):
        return
    names = {entry.own_name(name) for name in arguments}
    names |= {NAMES_OF_OPERATOR.get(name, name) for name in names}
    if entry.written:  # by the name of what is written, in place
        names.add("out")
    named = re.search(rf"\b({'|'.join(map(re.escape, names))})\b", str(error))
    assert named, f"{type(error).__name__}: {error}"


def check_call(entry, arguments, wants_gradients):
    """Make the call; return its error, if it raises."""
    expected, memory = plain_arguments(arguments), Memory(arguments)
    try:
        results = results_of(entry, arguments, wants_gradients)
    except SENTENCES as error:
        check_sentence(entry, error, arguments)
        memory.assert_unchanged()
        return error
    memory.assert_unchanged(except_for=entry.written)
    memory.assert_margins_unchanged(entry.written)
    if is_comparable(entry, arguments):
        assert_same(entry, results, results_of(entry, expected, wants_gradients))
    return None


def avoid_crash_of_torch(entry, arguments):
    """Its dispatcher reads an int as a dtype, and a process ends by one that is no dtype."""
    for name, value in arguments.items():
        if entry.name.startswith("torch.ops.") and name.endswith("dtype"):
            arguments[name] = value if isinstance(value, torch.dtype) else None


on_each_entry = pytest.mark.parametrize("entry", OPERATOR_ENTRIES, ids=lambda entry: entry.name)


@on_each_entry
def test_unbroken_calls_succeed(entry):
    def check(r):
        assert check_call(entry, entry.draw(r), entry.differentiable) is None

    for_random_calls(check, min(EXAMPLES, 60) // 6)


@on_each_entry
def test_broken_calls_raise_or_are_right(entry):
    def check(r):
        arguments = entry.draw(r)
        for _ in range(r.choice([1, 1, 1, 2, 4])):
            break_argument(r, arguments)
        for name in COUNTS_OF_ROWS:  # memory is not what is tested
            if isinstance(arguments.get(name), int):
                arguments[name] = max(min(arguments[name], 1000), -1)
        avoid_crash_of_torch(entry, arguments)
        check_call(entry, arguments, entry.differentiable and r.choice([False, True]))

    for_random_calls(check, EXAMPLES // 2)
