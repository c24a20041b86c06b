"""Collectives over a process group, with and without gradients, for tensor and sequence
parallelism.

Every collective works along the first dimension. Here ``process_group=None`` is torch's default
group, or this process alone where torch.distributed is not initialised; to the layers elsewhere it
is this process alone. In a group of one nothing is copied. gloo and NCCL groups both work: what a
backend lacks is made of what it has.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from flash_attn._arguments import as_int, check_tensors

__all__ = [
    "AllGatherFunc",
    "AllReduceFunc",
    "ReduceScatterFunc",
    "ReplicateFunc",
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "allreduce_sequence_parallel_grad",
    "get_dim_for_local_rank",
    "reduce_scatter",
    "reduce_scatter_raw",
    "replicate",
    "sync_shared_params",
]


class _Finished:
    """The handle of a collective that had nothing to do."""

    def wait(self, *_) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def group_size(process_group) -> int:
    """Return the number of processes over which a layer is spread; None: 1.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in the group.
    """
    if process_group is None:
        return 1
    is_member = process_group is not dist.GroupMember.NON_GROUP_MEMBER
    if is_member and not isinstance(process_group, dist.ProcessGroup):
        kind = type(process_group).__name__
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {kind}")
    size = dist.get_world_size(process_group)
    if size < 1:
        raise ValueError("process_group must be a group that this process is a member of")
    return size


def group_rank(process_group) -> int:
    """Return this process's place in the group: 0 to ``group_size(process_group) - 1``."""
    return dist.get_rank(process_group) if group_size(process_group) > 1 else 0


def _or_default(process_group):
    """The group, or torch's default one for None if there is one."""
    if process_group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return process_group


def _rows(input_: Tensor) -> int:
    check_tensors(input_=input_)
    if input_.dim() == 0:
        raise ValueError("input_ must have a first dimension, along which processes share it")
    return input_.shape[0]


def _unchanged(input_: Tensor, async_op: bool):
    return input_, _Finished() if async_op else None


_NAMES_BEFORE_SINGLE = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
}


def _of_one_tensor(name: str):
    """The collective that takes the processes' tensors as one, by its name in this torch."""
    single = getattr(dist, name + "_single", None)
    return getattr(dist, _NAMES_BEFORE_SINGLE[name]) if single is None else single


def _is_missing(error: RuntimeError) -> bool:
    """Whether the error says that the group's backend has no such collective."""
    return isinstance(error, NotImplementedError) or "support" in str(error)


def all_gather_raw(input_: Tensor, process_group, async_op: bool = False):
    """Concatenate the tensors of all processes; no gradient.

    Args:
        input_: ``(n, ...)``, of the same shape and dtype on every process.
        process_group: the group.
        async_op: whether to return before the result is there.

    Returns:
        ``(output, handle)``: ``(size * n, ...)``, process 0's rows first, and with ``async_op`` a
        handle whose ``wait()`` must come before ``output`` is read, else None. In a group of one,
        ``output`` is ``input_``.

    Raises:
        ValueError: ``input_`` has no dimension, or this process is not in the group.
    """
    process_group = _or_default(process_group)
    rows, size = _rows(input_), group_size(process_group)
    if size == 1:
        return _unchanged(input_, async_op)
    input_ = input_.contiguous()
    output = input_.new_empty((size * rows, *input_.shape[1:]))
    options = {"group": process_group, "async_op": async_op}
    try:
        handle = _of_one_tensor("all_gather")(output, input_, **options)
    except RuntimeError as error:
        if not _is_missing(error):
            raise
        handle = dist.all_gather(list(output.view(size, *input_.shape)), input_, **options)
    return output, handle


def reduce_scatter_raw(input_: Tensor, process_group, async_op: bool = False):
    """Add the tensors of all processes and keep this process's share of rows; no gradient.

    Args:
        input_: ``(size * n, ...)``, of the same shape and dtype on every process.
        process_group: the group, of ``size`` processes.
        async_op: whether to return before the result is there.

    Returns:
        ``(output, handle)``: ``(n, ...)``, and a handle as for ``all_gather_raw``. In a group of
        one, ``output`` is ``input_``.

    Raises:
        ValueError: the processes do not divide the rows, ``input_`` has no dimension, or this
            process is not in the group.
    """
    process_group = _or_default(process_group)
    rows, size = _rows(input_), group_size(process_group)
    if size == 1:
        return _unchanged(input_, async_op)
    if rows % size:
        raise ValueError(
            f"input_ has {rows} rows, which the {size} processes of the group do not divide evenly"
        )
    input_ = input_.contiguous()
    output = input_.new_empty((rows // size, *input_.shape[1:]))
    options = {"group": process_group, "async_op": async_op}
    try:
        handle = _of_one_tensor("reduce_scatter")(output, input_, **options)
    except RuntimeError as error:
        if not _is_missing(error):
            raise
        total = input_.clone()
        handle = dist.all_reduce(total, **options)
        output = total.chunk(size)[group_rank(process_group)]
    return output, handle


def all_reduce_raw(input_: Tensor, process_group, async_op: bool = False):
    """Add the tensors of all processes, in place if ``input_`` is contiguous; no gradient.

    Args:
        input_: of the same shape and dtype on every process.
        process_group: the group.
        async_op: whether to return before the result is there.

    Returns:
        ``(output, handle)``: of ``input_``'s shape, ``input_`` itself if it is contiguous, and a
        handle as for ``all_gather_raw``.

    Raises:
        ValueError: this process is not in the group.
    """
    check_tensors(input_=input_)
    process_group = _or_default(process_group)
    if group_size(process_group) == 1:
        return _unchanged(input_, async_op)
    input_ = input_.contiguous()
    return input_, dist.all_reduce(input_, group=process_group, async_op=async_op)


class AllGatherFunc(torch.autograd.Function):
    """``all_gather_raw`` whose gradient is reduced and scattered."""

    @staticmethod
    def forward(ctx, input_, process_group):
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx, grad_output):
        return reduce_scatter(grad_output, ctx.process_group), None


class ReduceScatterFunc(torch.autograd.Function):
    """``reduce_scatter_raw`` whose gradient is gathered."""

    @staticmethod
    def forward(ctx, input_, process_group):
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx, grad_output):
        return all_gather(grad_output, ctx.process_group), None


class AllReduceFunc(torch.autograd.Function):
    """The sum over all processes, not in place. Every process is to go on with the same
    computation, so that its gradient is already that of each summand."""

    @staticmethod
    def forward(ctx, input_, process_group):
        ctx.process_group = process_group
        if group_size(_or_default(process_group)) > 1:
            input_ = input_.clone(memory_format=torch.contiguous_format)
        return all_reduce_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx, grad_output):
        return replicate(grad_output, ctx.process_group), None


class ReplicateFunc(torch.autograd.Function):
    """A tensor that is the same on all processes, for each of which to go on with a computation of
    its own: the gradients of all are added."""

    @staticmethod
    def forward(ctx, input_, process_group):
        ctx.process_group = process_group
        return input_.view_as(input_)

    @staticmethod
    def backward(ctx, grad_output):
        return all_reduce(grad_output, ctx.process_group), None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply
replicate = ReplicateFunc.apply


def _marked_parameters(model: torch.nn.Module, mark: str) -> list[torch.nn.Parameter]:
    """Parameters with the attribute ``mark``, in the order of their names, as on every process."""
    return [p for _, p in sorted(model.named_parameters()) if getattr(p, mark, False)]


def sync_shared_params(model: torch.nn.Module, process_group) -> None:
    """Give every process the values that the group's first one has, in the parameters whose
    attribute ``_shared_params`` is true."""
    process_group = _or_default(process_group)
    if group_size(process_group) == 1:
        return
    source = dist.get_global_rank(process_group, 0)
    for parameter in _marked_parameters(model, "_shared_params"):
        values = parameter.detach().contiguous()
        dist.broadcast(values, source, group=process_group)
        parameter.data.copy_(values)


def _sum_gradients(parameters: list[torch.nn.Parameter], process_group) -> None:
    """Add the gradients of parameters of one dtype and device in one collective.

    A process without a gradient adds zeros. Behind the gradients goes the number of processes that
    have each, so that what has none anywhere stays without.
    """
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    has_grad = grads[0].new_tensor([p.grad is not None for p in parameters])
    total, _ = all_reduce_raw(_flatten_dense_tensors([*grads, has_grad]), process_group)
    *sums, counts = _unflatten_dense_tensors(total, [*grads, has_grad])
    for parameter, grad, summed, count in zip(parameters, grads, sums, counts):
        if parameter.grad is not None or count.item():
            parameter.grad = grad.copy_(summed)


@torch.no_grad()
def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group) -> None:
    """Add the gradients of all processes, in the parameters whose attribute ``_sequence_parallel``
    is true: those that saw only this process's share of the tokens."""
    process_group = _or_default(process_group)
    if group_size(process_group) == 1:
        return
    kinds: dict = {}
    for parameter in _marked_parameters(model, "_sequence_parallel"):
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for parameters in kinds.values():
        _sum_gradients(parameters, process_group)


def _at_least(name: str, value, smallest: int) -> int:
    value = as_int(name, value)
    if value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value}")
    return value


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """Return the part of ``dim`` that a process holds: a multiple of ``multiple_of``, the first
    processes one more than the last where the processes do not divide ``dim // multiple_of``.

    Raises:
        ValueError: ``multiple_of`` does not divide ``dim``, or ``local_rank`` is not one of the
            ``world_size`` processes.
    """
    dim, world_size = _at_least("dim", dim, 0), _at_least("world_size", world_size, 1)
    multiple_of = _at_least("multiple_of", multiple_of, 1)
    local_rank = _at_least("local_rank", local_rank, 0)
    if local_rank >= world_size:
        raise ValueError(f"local_rank {local_rank} is not below world_size {world_size}")
    if dim % multiple_of:
        raise ValueError(f"dim ({dim}) must be a multiple of multiple_of ({multiple_of})")
    share, rest = divmod(dim // multiple_of, world_size)
    return (share + (local_rank < rest)) * multiple_of
