"""Operators made of Triton kernels, or of torch's operators where there is no Triton."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable, Optional, Union

import torch

__all__ = ["triton_op"]


def triton_op(
    name: str,
    fn: Optional[Callable] = None,
    /,
    *,
    mutates_args: Union[str, Iterable[str]],
    schema: Optional[str] = None,
    allow_decomposition: bool = True,
) -> Callable:
    """Make an operator of a function that torch can trace.

    Args:
        name: "namespace::name".
        fn: made of Triton kernels, each in ``torch.library.wrap_triton``, and of torch's operators,
            with annotated arguments; it also gives the results' shapes. None: return a decorator.
        mutates_args: names of the arguments that ``fn`` writes to, or "unknown".
        schema: such as "(Tensor x, int y) -> Tensor"; None: inferred from ``fn``.
        allow_decomposition: whether ``torch.compile`` sees what the operator consists of, as
            ``torch.library.triton_op`` has it. False, or with a ``schema``, or in a torch without
            ``triton_op``: it sees the operator alone.

    Returns:
        The operator, which has ``register_autograd`` and the like.

    Raises:
        ValueError: the schema cannot be inferred, or ``mutates_args`` names no argument.
    """

    def made(fn: Callable) -> Callable:
        if allow_decomposition and schema is None and hasattr(torch.library, "triton_op"):
            return torch.library.triton_op(name, fn, mutates_args=mutates_args)
        operator = torch.library.custom_op(name, fn, mutates_args=mutates_args, schema=schema)
        operator.register_fake(fn)
        return operator

    return made if fn is None else made(fn)
