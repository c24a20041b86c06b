"""What each process of test_vocab_parallel.py does: losses of shards of the classes against the
losses of all of them."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.distributed as dist
from cross_entropy_cases import ALL_OPTIONS, BF16, DTYPES, logits_and_labels

from flash_attn.losses.cross_entropy import CrossEntropyLoss, linear_cross_entropy_loss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

RANKS = 4
ROWS, CLASSES, FEATURES = 70, 48, 16


def share(x, group, dim=-1):
    """This process's part of what is divided over classes."""
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def tolerance(dtype):
    return {"rtol": 1e-5 if dtype == torch.float32 else 1e-2, "atol": 2e-6}


def check_logits(group, dtype, in_place, **options):
    logits, labels = logits_and_labels(ROWS, CLASSES, dtype)
    logits[0, : CLASSES // 2] = -math.inf  # all that some processes have
    whole = logits.clone().requires_grad_()
    part = share(logits, group).clone().requires_grad_()
    expected = cross_entropy_loss(whole, labels, **options)
    actual = cross_entropy_loss(
        part * 1, labels, process_group=group, inplace_backward=in_place, **options
    )
    torch.testing.assert_close(actual, expected)
    dlosses = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))
    expected[0].backward(dlosses)
    actual[0].backward(dlosses)
    torch.testing.assert_close(part.grad, share(whole.grad, group), **tolerance(dtype))


def check_module(group):
    logits, labels = logits_and_labels(ROWS, CLASSES)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.1, "return_z_loss": True}
    expected = CrossEntropyLoss(**options)(logits, labels)
    actual = CrossEntropyLoss(**options, process_group=group)(share(logits, group), labels)
    torch.testing.assert_close(actual, expected)


def check_precomputed_lse(group):
    """That of the shard."""
    logits, labels = logits_and_labels(ROWS, CLASSES)
    part = share(logits, group)
    losses, _ = cross_entropy_loss(part, labels, part.logsumexp(1), process_group=group)
    torch.testing.assert_close(losses, cross_entropy_loss(logits, labels)[0])


def check_label_out_of_range(group):
    logits, labels = logits_and_labels(ROWS, CLASSES)
    labels[3] = CLASSES
    with pytest.raises(RuntimeError, match=f"labels must be 0 to {CLASSES - 1} or .* row 3 is"):
        cross_entropy_loss(share(logits, group), labels, process_group=group)


def check_linear(group, dtype, reduction):
    """hidden is the same on all processes, and so is its gradient."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(s, generator=gen).to(dtype) for s in ((ROWS, FEATURES), (CLASSES, FEATURES),
                                                          (CLASSES,))
    )  # fmt: skip
    labels = logits_and_labels(ROWS, CLASSES)[1]
    options = {"reduction": reduction, **ALL_OPTIONS}
    whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    expected = linear_cross_entropy_loss(*whole[:2], labels, whole[2], **options)
    parts = [hidden, share(weight, group, 0), share(bias, group, 0)]
    parts = [x.clone().requires_grad_() for x in parts]
    actual = linear_cross_entropy_loss(*parts[:2], labels, parts[2], process_group=group, **options)
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    wanted = [whole[0].grad, share(whole[1].grad, group, 0), share(whole[2].grad, group, 0)]
    for part, of_part in zip(parts, wanted):
        torch.testing.assert_close(part.grad, of_part, **_relative(of_part, dtype))


def _relative(x, dtype):
    return {"rtol": 0, "atol": (1e-5 if dtype == torch.float32 else 2e-2) * x.abs().max().item()}


def check_group(group):
    for dtype in DTYPES:
        for options in ({}, ALL_OPTIONS):
            check_logits(group, dtype, in_place=bool(options), **options)
    check_module(group)
    check_precomputed_lse(group)
    check_label_out_of_range(group)
    for dtype in (torch.float32, BF16):
        for reduction in ("mean", "none"):
            check_linear(group, dtype, reduction)


def run_rank(rank, port):
    """Checks groups of four processes, of two, and of one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    try:
        check_group(dist.group.WORLD)
        for ranks in ((0, 1), (2, 3), (0,)):
            group = dist.new_group(ranks)
            if rank in ranks:
                check_group(group)
            else:
                with pytest.raises(ValueError, match="a group that this process is a member of"):
                    CrossEntropyLoss(process_group=group)(*logits_and_labels(2, 3))
    finally:
        dist.destroy_process_group()
