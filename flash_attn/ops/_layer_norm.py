"""The operators behind ``ops.layer_norm``, ``ops.rms_norm`` and ``ops.triton.layer_norm``.

x = dropout(x0) rowscale colscale + dropout(x1) + residual, rounded to its dtype; out = norm(x)
weight + bias, and out1 with a weight and bias of its own. Arithmetic is fp32; each tensor has a
dtype of its own. Results that a call does without are empty tensors.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from flash_attn._arguments import as_int, check_dtype, check_tensors, flag, is_plain, number
from flash_attn._buffers import new_rng_state, raise_versions
from flash_attn._eager import refuse_shared_randomness
from flash_attn._fused import Fused, as_matrix
from flash_attn._library import bind

_NORM = (
    "rowscale rowscale_const colscale x0_subset out_subset weight bias weight1 bias1 epsilon"
    " p_dropout rng_state is_rms_norm zero_centered_weight"
)
_run_forward = bind(
    "layer_norm_fwd",
    f"x0 x1 residual {_NORM} out out1 x dropout_mask dropout_mask1 mean rstd",
)
_run_backward = bind(
    "layer_norm_bwd",
    f"x dout dout1 dx x0 mean rstd {_NORM} dx0 dx1 dresidual dweight dbias dweight1 dbias1"
    " dcolscale out",
)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _columns(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.contiguous()


def _rows(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.reshape(-1).contiguous()


def _matrix(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else as_matrix(x)


def _index(name: str, x: Optional[Tensor]) -> Optional[Tensor]:
    if x is None:
        return None
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    x = x.reshape(-1)
    if x.dtype == torch.int64:  # what does not fit stays out of range
        x = x.clamp(-1, 2**31 - 1)
    return x.to(torch.int32).contiguous()


def _given(x: Tensor, is_given) -> Optional[Tensor]:
    return x if is_given else None


class _Forward(NamedTuple):
    """The arguments of the forward, in their order."""

    x0: Tensor
    x1: Optional[Tensor]
    residual: Optional[Tensor]
    rowscale: Optional[Tensor]
    colscale: Optional[Tensor]
    x0_subset: Optional[Tensor]
    out_subset: Optional[Tensor]
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    weight1: Optional[Tensor]
    bias1: Optional[Tensor]
    rowscale_const: float
    epsilon: float
    dropout_p: float
    is_rms_norm: bool
    zero_centered_weight: bool
    out_numrows: int  # with out_subset
    out_dtype: torch.dtype
    residual_dtype: torch.dtype  # of x
    wants_x: bool
    wants_mask: bool

    @property
    def shape(self) -> torch.Size:
        """Of x."""
        if self.x0_subset is None:
            return self.x0.shape
        for other in (self.x1, self.residual):
            if other is not None:
                return other.shape
        return torch.Size((self.x0_subset.numel(), self.x0.shape[-1]))

    @property
    def shape_of_out(self) -> torch.Size:
        if self.out_subset is None:
            return self.shape
        return torch.Size((self.out_numrows, self.x0.shape[-1]))

    def norm(self, rng_state: Tensor) -> tuple:
        """Return what the library's functions are told alike."""
        return (
            _rows(self.rowscale),
            self.rowscale_const,
            _columns(self.colscale),
            _index("x0_subset", self.x0_subset),
            _index("out_subset", self.out_subset),
            _columns(self.weight),
            _columns(self.bias),
            _columns(self.weight1),
            _columns(self.bias1),
            self.epsilon,
            self.dropout_p,
            rng_state,
            self.is_rms_norm,
            self.zero_centered_weight,
        )

    @property
    def masks(self) -> tuple[bool, bool]:
        """Which of the dropout masks are made."""
        wants = self.wants_mask and self.dropout_p > 0.0
        return wants, wants and self.x1 is not None

    def results(self) -> tuple:
        """Return uninitialised (out, out1, x, mean, rstd); rows that a subset leaves out are 0."""
        new = self.x0.new_empty if self.out_subset is None else self.x0.new_zeros
        shape = self.shape
        rows = shape[:-1].numel()
        stats = {"dtype": torch.float32}
        return (
            new(self.shape_of_out, dtype=self.out_dtype),
            new(self.shape_of_out if self.weight1 is not None else (0,), dtype=self.out_dtype),
            self.x0.new_empty(shape if self.wants_x else (0,), dtype=self.residual_dtype),
            self.x0.new_empty(0 if self.is_rms_norm else rows, **stats),
            self.x0.new_empty(rows, **stats),
        )


class _Mask:
    """A dropout mask while it is written: a byte a column, rows of whole 32-bit words."""

    def __init__(self, shape: torch.Size, is_wanted: bool, device):
        self.shape, self.words = shape, None
        if is_wanted:
            rows, words = shape[:-1].numel(), (shape[-1] + 3) // 4
            self.words = torch.zeros(rows, words, dtype=torch.int32, device=device)

    def as_bool(self, device) -> Tensor:
        if self.words is None:
            return torch.empty(0, dtype=torch.bool, device=device)
        bytes = self.words.view(torch.uint8)[:, : self.shape[-1]]
        return bytes.contiguous().view(torch.bool).view(self.shape)


def _forward_kernel(*args, out: Optional[Tensor] = None, x: Optional[Tensor] = None):
    """``out``, ``x``: the caller's buffers for them."""
    call = _Forward(*args)
    new_out, out1, new_x, mean, rstd = call.results()
    out, x = new_out if out is None else out, new_x if x is None else x
    results = out, out1, x, mean, rstd
    device = call.x0.device
    shapes = call.x0.shape, call.shape
    masks = [_Mask(shape, wants, device) for shape, wants in zip(shapes, call.masks)]
    rng_state = new_rng_state(call.dropout_p)
    _run_forward(
        as_matrix(call.x0),
        _matrix(call.x1),
        _matrix(call.residual),
        *call.norm(rng_state),
        as_matrix(out),
        _given(as_matrix(out1), call.weight1 is not None),
        _given(as_matrix(x), call.wants_x),
        *(mask.words for mask in masks),
        _given(mean, not call.is_rms_norm),
        rstd,
    )
    return (*results, *(mask.as_bool(device) for mask in masks), rng_state)


def _fake_forward(*args):
    call = _Forward(*args)
    masks = [
        call.x0.new_empty(shape if is_wanted else (0,), dtype=torch.bool)
        for shape, is_wanted in zip((call.x0.shape, call.shape), call.masks)
    ]
    return (*call.results(), *masks, torch.empty(2, dtype=torch.int64, device="cpu"))


class _Backward(NamedTuple):
    """The arguments of the backward, in their order."""

    x: Tensor
    dout: Tensor
    dout1: Optional[Tensor]
    dx: Optional[Tensor]
    x0: Optional[Tensor]
    mean: Tensor
    rstd: Tensor
    rng_state: Tensor
    rowscale: Optional[Tensor]
    colscale: Optional[Tensor]
    x0_subset: Optional[Tensor]
    out_subset: Optional[Tensor]
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    weight1: Optional[Tensor]
    bias1: Optional[Tensor]
    rowscale_const: float
    epsilon: float
    dropout_p: float
    is_rms_norm: bool
    zero_centered_weight: bool
    x0_numrows: int  # with x0_subset
    x0_dtype: torch.dtype
    wants_dx1: bool
    residual_dtype: Optional[torch.dtype]  # None: dresidual is not wanted
    out_dtype: Optional[torch.dtype]  # None: out is not wanted once more

    norm = _Forward.norm

    def gradients_of_columns(self) -> list[Optional[Tensor]]:
        """Return uninitialised gradients of weight, bias, weight1, bias1, colscale, or None."""
        vectors = self.weight, self.bias, self.weight1, self.bias1, self.colscale
        return [None if v is None else torch.empty_like(v).contiguous() for v in vectors]

    def gradients_of_branches(self) -> list[Optional[Tensor]]:
        """Return uninitialised (dx0, dx1, dresidual); rows that a subset leaves out are 0."""
        x = self.x
        if self.x0_subset is None:
            dx0 = x.new_empty(x.shape, dtype=self.x0_dtype)
        else:
            dx0 = x.new_zeros((self.x0_numrows, x.shape[-1]), dtype=self.x0_dtype)
        dx1 = x.new_empty(x.shape, dtype=self.x0_dtype) if self.wants_dx1 else None
        if self.residual_dtype is None:
            return [dx0, dx1, None]
        return [dx0, dx1, x.new_empty(x.shape, dtype=self.residual_dtype)]

    def new_out(self) -> Optional[Tensor]:
        if self.out_dtype is None:
            return None
        return self.dout.new_zeros(self.dout.shape, dtype=self.out_dtype)


def _or_empty(x: Tensor, results) -> tuple:
    return tuple(x.new_empty(0) if result is None else result for result in results)


def _backward_kernel(*args):
    call = _Backward(*args)
    branches, columns, out = call.gradients_of_branches(), call.gradients_of_columns(), None
    out = call.new_out()
    _run_backward(
        as_matrix(call.x),
        as_matrix(call.dout),
        _matrix(call.dout1),
        _matrix(call.dx),
        _matrix(call.x0),
        _given(call.mean, not call.is_rms_norm),
        call.rstd,
        *call.norm(call.rng_state),
        *(_matrix(x) for x in branches),
        *columns,
        _matrix(out),
    )
    return _or_empty(call.x, (*branches, *columns, out))


def _fake_backward(*args):
    call = _Backward(*args)
    results = *call.gradients_of_branches(), *call.gradients_of_columns(), call.new_out()
    return _or_empty(call.x, results)


_COMMON = (
    "Tensor? rowscale, Tensor? colscale, Tensor? x0_subset, Tensor? out_subset, Tensor? weight,"
    " Tensor? bias, Tensor? weight1, Tensor? bias1, float rowscale_const, float epsilon,"
    " float dropout_p, bool is_rms_norm, bool zero_centered_weight"
)

backward = Fused(
    "layer_norm_bwd(Tensor x, Tensor dout, Tensor? dout1, Tensor? dx, Tensor? x0, Tensor mean,"
    f" Tensor rstd, Tensor rng_state, {_COMMON}, SymInt x0_numrows, ScalarType x0_dtype,"
    " bool wants_dx1, ScalarType? residual_dtype, ScalarType? out_dtype) -> (Tensor dx0,"
    " Tensor dx1, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dweight1, Tensor dbias1,"
    " Tensor dcolscale, Tensor out)",
    _backward_kernel,
    _fake_backward,
)


def _save(ctx, args, results) -> None:
    call = _Forward(*args)
    _, _, x, mean, rstd, _, _, rng_state = results
    x = x if call.wants_x else call.x0
    x0 = call.x0 if call.colscale is not None else None
    ctx.call = call._replace(**dict.fromkeys(call._fields[:11]))
    ctx.x0_dtype, ctx.x0_shape = call.x0.dtype, call.x0.shape
    ctx.residual_dtype = None if call.residual is None else call.residual.dtype
    ctx.x1_shape = None if call.x1 is None else call.x1.shape
    ctx.save_for_backward(x, x0, mean, rstd, rng_state, *call[3:11])


def _gradients(ctx, dout, dout1, dx, *_):
    x, x0, mean, rstd, rng_state, *common = ctx.saved_tensors
    call: _Forward = ctx.call._replace(**dict(zip(_Forward._fields[3:11], common)))
    dout1 = _given(dout1, call.weight1 is not None)
    if dout is None:
        dout = _zero_gradient(call, x, dout1)
    one_gradient = _is_plain(call) and ctx.residual_dtype == ctx.x0_dtype
    wants_dresidual = ctx.residual_dtype is not None and not one_gradient
    dx0, dx1, dresidual, *columns, _ = backward(
        x,
        dout,
        dout1,
        dx,
        x0,
        mean,
        rstd,
        rng_state,
        *common,
        *call[11:16],
        ctx.x0_shape[:-1].numel(),
        ctx.x0_dtype,
        ctx.x1_shape is not None,
        ctx.residual_dtype if wants_dresidual else None,
        None,
    )
    dx0 = dx0.view(ctx.x0_shape)
    dresidual = _given(dx0 if one_gradient else dresidual, ctx.residual_dtype is not None)
    dweight, dbias, dweight1, dbias1, dcolscale = (
        _given(gradient, vector is not None)
        for gradient, vector in zip(columns, (*common[4:], common[1]))
    )
    return (
        dx0,
        _given(dx1, ctx.x1_shape is not None),
        dresidual,
        None,
        dcolscale,
        None,
        None,
        dweight,
        dbias,
        dweight1,
        dbias1,
        *(None,) * 10,
    )


def _is_plain(call: _Forward) -> bool:
    """Whether x0 is a summand as it is."""
    return (
        call.dropout_p == 0.0
        and call.rowscale is None
        and call.colscale is None
        and call.x0_subset is None
        and call.rowscale_const == 1.0
    )


def _zero_gradient(call: _Forward, x: Tensor, dout1: Optional[Tensor]) -> Tensor:
    if dout1 is not None:
        return torch.zeros_like(dout1)
    shape = x.shape if call.out_subset is None else (call.out_numrows, x.shape[-1])
    return x.new_zeros(shape, dtype=call.out_dtype)


_forward = Fused(
    f"layer_norm_fwd(Tensor x0, Tensor? x1, Tensor? residual, {_COMMON}, SymInt out_numrows,"
    " ScalarType out_dtype, ScalarType residual_dtype, bool wants_x, bool wants_mask)"
    " -> (Tensor out, Tensor out1, Tensor x, Tensor mean, Tensor rstd, Tensor dropout_mask,"
    " Tensor dropout_mask1, Tensor rng_state)",
    _forward_kernel,
    _fake_forward,
    _save,
    _gradients,
    tags=(torch.Tag.nondeterministic_seeded,),
)


class Normed(NamedTuple):
    """What ``add_norm`` returns; what does not exist is None."""

    out: Tensor
    out1: Optional[Tensor]
    x: Tensor  # the sum of the branches
    mean: Optional[Tensor]
    rstd: Tensor
    dropout_mask: Optional[Tensor]
    dropout_mask1: Optional[Tensor]
    rng_state: Tensor


def add_norm(
    x0: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], epsilon: float, **options
):
    """Return norm(dropout(x0) rowscale colscale + dropout(x1) + residual) weight + bias: a Normed.

    Args:
        x0: ``(..., n)``; with ``x0_subset`` the rows that it names, ``(x0_numrows, n)``.
        weight, bias: ``(n,)``, or None.
        epsilon: added to the variance.
        options: of ``_call_of``.

    Raises RuntimeError with the library's sentence for what it cannot take.
    """
    call = _call_of(x0, weight, bias, epsilon, **options)
    return _normed(call, _forward(*call))


def add_norm_into(out: Optional[Tensor], x: Optional[Tensor], x0, weight, bias, epsilon, **options):
    """As ``add_norm``, its first output and the sum written to ``out`` and ``x`` where given."""
    call = _call_of(x0, weight, bias, epsilon, **options)
    if x is not None:
        call = call._replace(wants_x=True)
    takes_buffers = _check_buffer("out", out, x0) and _check_buffer("residual_out", x, x0)
    is_readable = all(_is_readable(t) for t in call if isinstance(t, Tensor))
    is_for_torch = torch.compiler.is_compiling() or _wants_gradients(call)
    if is_for_torch or not (takes_buffers and is_readable):
        normed = _normed(call, _forward(*call))
        return normed._replace(
            out=normed.out if out is None else out.copy_(normed.out),
            x=normed.x if x is None else x.copy_(normed.x),
        )
    normed = _normed(call, _forward_kernel(*call, out=out, x=x))
    raise_versions(out, x)
    return normed


def _check_buffer(name: str, buffer: Optional[Tensor], x0: Tensor) -> bool:
    """Return whether the kernel can write to a caller's buffer; None: there is none."""
    if buffer is None:
        return True
    check_tensors(**{name: buffer})
    if buffer.shape != x0.shape:
        raise ValueError(f"{name} must have the shape {tuple(x0.shape)}, got {tuple(buffer.shape)}")
    return _is_readable(buffer) and buffer.is_contiguous() and buffer.dtype in DTYPES


def _is_readable(x: Tensor) -> bool:
    """Whether the library can be handed a tensor as it is."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return is_plain(x) and not is_wrapped and not x.is_neg() and (x.is_cpu or x.is_cuda)


def _call_of(
    x0: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    epsilon: float,
    *,
    x1: Optional[Tensor] = None,
    residual: Optional[Tensor] = None,
    weight1: Optional[Tensor] = None,
    bias1: Optional[Tensor] = None,
    rowscale: Optional[Tensor] = None,
    colscale: Optional[Tensor] = None,
    x0_subset: Optional[Tensor] = None,
    out_subset: Optional[Tensor] = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    dropout_p: float = 0.0,
    is_rms_norm: bool = False,
    zero_centered_weight: bool = False,
    out_dtype: Optional[torch.dtype] = None,
    residual_dtype: Optional[torch.dtype] = None,
    wants_x: bool = True,
    wants_mask: bool = False,
) -> _Forward:
    """Return the arguments of a forward.

    Args:
        x1, residual: ``(..., n)``.
        weight1: makes the second output, with bias1; ``(n,)``, as is colscale.
        rowscale: ``(...)``, a factor of the rows of x0; so is ``rowscale_const``.
        x0_subset, out_subset: integers ``(...)``: rows of x0 and of the outputs, counted from 1,
            for each row of the sum; 0: none.
        out_numrows: rows of the outputs, with ``out_subset``.
        out_dtype: of the outputs; None: that of x0.
        residual_dtype: of the sum; None: that of residual, or of x0.
        wants_x: whether the sum is wanted beside the gradients.
        wants_mask: whether what dropout kept is.
    """
    _check_shapes(x0, x1, residual, rowscale, x0_subset, out_subset)
    for name, dtype in (("out_dtype", out_dtype), ("residual_dtype", residual_dtype)):
        if dtype is not None:
            check_dtype(name, dtype, DTYPES)
    own_dtype = x0.dtype if residual is None else residual.dtype
    residual_dtype = own_dtype if residual_dtype is None else residual_dtype
    call = _Forward(
        x0,
        x1,
        residual,
        rowscale,
        colscale,
        x0_subset,
        out_subset,
        weight,
        bias,
        weight1,
        bias1,
        number("rowscale_const", rowscale_const),
        number("epsilon", epsilon),
        number("dropout_p", dropout_p),
        flag("is_rms_norm", is_rms_norm),
        flag("zero_centered_weight", zero_centered_weight),
        _number_of_rows(out_numrows),
        x0.dtype if out_dtype is None else out_dtype,
        residual_dtype,
        False,
        flag("return_dropout_mask", wants_mask),
    )
    if call.dropout_p > 0.0:
        refuse_shared_randomness("a norm")
    x_is_x0 = x1 is None and residual is None and _is_plain(call) and residual_dtype == x0.dtype
    wants_x = flag("prenorm", wants_x) or residual_dtype != own_dtype or _wants_gradients(call)
    return call._replace(wants_x=wants_x and not x_is_x0)


def _number_of_rows(out_numrows) -> int:
    out_numrows = as_int("out_numrows", out_numrows)
    if out_numrows < 0:
        raise ValueError(f"out_numrows must not be negative, got {out_numrows}")
    return out_numrows


def _check_shapes(x0: Tensor, x1, residual, rowscale, x0_subset, out_subset) -> None:
    """Raise ValueError for summands of another shape than x0, which may have as many rows."""
    if x0.dim() != 2 and out_subset is not None:
        raise ValueError(f"x0 with out_subset must be (rows, n), got {tuple(x0.shape)}")
    if x0_subset is not None:
        if x0.dim() != 2:
            raise ValueError(f"x0 with x0_subset must be (x0_numrows, n), got {tuple(x0.shape)}")
        if residual is not None and residual.shape[-1:] != x0.shape[-1:]:
            raise ValueError(
                f"residual must have the columns of x0, {x0.shape[-1:]}, got "
                f"{tuple(residual.shape)}"
            )
        return
    for name, x, shape in (
        ("x1", x1, x0.shape),
        ("residual", residual, x0.shape),
        ("rowscale", rowscale, x0.shape[:-1]),
    ):
        if isinstance(x, Tensor) and x.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(x.shape)}")


def _normed(call: _Forward, results: tuple) -> Normed:
    out, out1, x, mean, rstd, mask, mask1, rng_state = results
    wants_mask, wants_mask1 = call.masks
    return Normed(
        out,
        _given(out1, call.weight1 is not None),
        x if call.wants_x else call.x0,
        _given(mean, not call.is_rms_norm),
        rstd,
        _given(mask, wants_mask),
        _given(mask1, wants_mask1),
        rng_state,
    )


def _wants_gradients(call: _Forward) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call[:11])
