"""Valid calls of every entry point of the fused operators, to be broken as those of attention are.

An entry point takes its arguments from a pool, as in ``malformed_calls``: by keyword, but for the
functions of the library, which take them by position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from malformed_calls import Entry, indices, offsets, tensor

from flash_attn._library import bind
from flash_attn.layers import rotary as rotary_layers
from flash_attn.losses.cross_entropy import linear_cross_entropy_loss
from flash_attn.ops import activations, fused_dense, layer_norm, rms_norm
from flash_attn.ops.triton import layer_norm as norms
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.linear import triton_dgrad_act, triton_linear_act
from flash_attn.ops.triton.mlp import FusedDenseSqreluDenseFunc
from flash_attn.ops.triton.rotary import apply_rotary

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass
class OperatorEntry(Entry):
    """An entry point of a fused operator.

    ``differentiable``: its backward is called, too. ``exact``: results do not depend on where and
    how the arguments lie, not even by their rounding, as products of torch's do.
    """

    differentiable: bool = False
    exact: bool = True


def dtype_of(r):
    return r.choice([FP32, FP16, BF16])


def maybe(r, x):
    return r.choice([None, x])


def tensors(r, dtype, shapes: dict) -> dict:
    return {name: tensor(r, shape, dtype) for name, shape in shapes.items()}


def activation_pool(r, lead=None):
    dtype, cols = dtype_of(r), r.choice([1, 3, 8, 17])
    lead = r.choice([(), (0,), (3,), (2, 2)]) if lead is None else lead
    names = ("x", "y", "g", "out", "dout", "dx", "dy")
    pool = tensors(r, dtype, {**dict.fromkeys(names, (*lead, cols)), "bias": (cols,)})
    pool["activation"] = r.choice(["gelu_approx", "relu", "sqrelu", "silu", "sigmoid"])
    pool["with_dbias"] = r.choice([False, True])
    return pool


def activation_matrices(r):
    pool = activation_pool(r, (r.choice([0, 1, 3, 20]),))
    pool.update(activation=r.randrange(5), bias=maybe(r, pool["bias"]))
    pool["dbias"] = maybe(r, tensor(r, pool["x"].shape[-1:]))
    pool["with_dbias"] = pool["bias"] is not None and pool["with_dbias"]
    if r.choice([False, True]):
        pool.update(y=None, dy=None)
    return pool


def subset(r, rows, targets):
    """Rows of targets counted from 1, none twice; 0: none."""
    return indices([r.choice([0, row]) for row in r.sample(range(1, targets + 1), rows)])


def norm_options(r, dtype, rows, cols):
    pool = {}
    for name in ("weight", "bias", "weight1", "bias1", "colscale"):
        pool[name] = maybe(r, tensor(r, (cols,), r.choice([dtype, FP32])))
    pool["rowscale"] = maybe(r, tensor(r, rows, r.choice([dtype, FP32])))
    pool["rowscale_const"] = r.choice([1.0, 0.5])
    pool["epsilon"] = pool["eps"] = r.choice([1e-5, 0.1])
    pool["dropout_p"] = pool["p_dropout"] = r.choice([0.0, 0.0, 0.3])
    pool["rng_state"] = torch.tensor([r.randrange(2**40), 0])
    flags = ("is_rms_norm", "zero_centered_weight", "prenorm", "residual_in_fp32")
    pool.update({name: r.choice([False, True]) for name in flags})
    pool["return_dropout_mask"] = r.choice([False, True])
    pool["out_dtype"] = r.choice([None, dtype, FP32])
    return pool


def norm_pool(r):
    dtype, cols, rows = dtype_of(r), r.choice([1, 3, 8, 17]), r.choice([(), (0,), (3,), (2, 2)])
    pool = norm_options(r, dtype, rows, cols)
    shapes = dict.fromkeys(("x", "x0", "x1", "residual", "dy", "dresidual"), (*rows, cols))
    pool.update(tensors(r, dtype, shapes))
    pool["weight0"], pool["bias0"] = tensor(r, (cols,), dtype), maybe(r, tensor(r, (cols,), dtype))
    for name in ("x1", "residual"):
        pool[name] = maybe(r, pool[name])
    pool["layerscale"] = pool["colscale"]
    pool["norm_weight"], pool["norm_bias"] = pool["weight0"], pool["bias0"]
    pool["linear_weight"] = tensor(r, (5, cols), dtype)
    pool["linear_bias"] = maybe(r, tensor(r, (5,), dtype))
    return pool


def weighted_norm_pool(r):
    """Of functions that want the weight."""
    pool = norm_pool(r)
    if pool["weight"] is None:
        pool["weight"] = pool["weight0"]
    return pool


def subset_pool(r):
    """Of norms of some rows."""
    pool = weighted_norm_pool(r)
    cols, rows, dtype = pool["x0"].shape[-1], r.choice([0, 1, 4]), pool["x0"].dtype
    x0_rows, pool["out_numrows"] = rows + r.choice([0, 2]), rows + r.choice([0, 2])
    pool["x0"] = tensor(r, (x0_rows, cols), dtype)
    pool["residual"] = maybe(r, tensor(r, (rows, cols), dtype))
    pool["x0_subset"] = subset(r, rows, x0_rows)
    pool["out_subset"] = subset(r, rows, pool["out_numrows"])
    return pool


def norm_matrices(r):
    """Of the library's functions: what the outputs are given for is random, but for out."""
    dtype, cols, rows = dtype_of(r), r.choice([1, 3, 8, 17]), r.choice([0, 1, 3, 20])
    pool = norm_options(r, dtype, (rows,), cols)
    matrices = ("x0", "x1", "residual", "x", "dout", "dout1", "dx", "dx0", "dx1", "dresidual")
    matrices += ("out", "out1")
    for name in matrices:
        pool[name] = tensor(r, (rows, cols), r.choice([dtype, FP32]))
    for name in ("x1", "residual", "dout1", "dx", "dx0", "dx1", "dresidual"):
        pool[name] = maybe(r, pool[name])
    for name in ("dweight", "dbias", "dweight1", "dbias1", "dcolscale"):
        pool[name] = maybe(r, tensor(r, (cols,), r.choice([dtype, FP32])))
    pool["mean"], pool["rstd"] = tensor(r, (rows,)), tensor(r, (rows,)).abs_()
    pool["x0_subset"] = maybe(r, subset(r, rows, rows))
    pool["out_subset"] = maybe(r, subset(r, rows, rows))
    words = (rows, (cols + 3) // 4)
    masks = (maybe(r, torch.zeros(words, dtype=torch.int32)) for _ in range(2))
    pool["dropout_mask"], pool["dropout_mask1"] = masks if pool["dropout_p"] > 0 else (None, None)
    if pool["x1"] is None:
        pool["dropout_mask1"] = None
    return pool


def norm_backward_matrices(r):
    pool = norm_matrices(r)
    pool["out"] = maybe(r, pool["out"])
    if pool["is_rms_norm"]:
        pool["mean"] = None
    return pool


def norm_forward_operator(r):
    """Of torch's operator: matrices, with the dtypes of results."""
    pool = norm_matrices(r)
    pool.update(out_numrows=pool["x0"].shape[0], residual_dtype=pool["x"].dtype)
    pool.update(wants_x=r.choice([False, True]), wants_mask=r.choice([False, True]))
    pool["out_dtype"] = pool["out"].dtype
    return pool


def norm_backward_operator(r):
    pool = norm_matrices(r)
    pool.update(x0_numrows=pool["x0"].shape[0], x0_dtype=pool["x0"].dtype)
    pool.update(wants_dx1=r.choice([False, True]), residual_dtype=r.choice([None, FP32]))
    if pool["is_rms_norm"]:
        pool["mean"] = torch.empty(0)
    return pool


def tables(r, pool, dtype, length, pairs, names):
    dtype = r.choice([dtype, FP32])
    pool.update(tensors(r, dtype, dict.fromkeys(names, (length, pairs))))


def rotary_pool(r, packed=None):
    """Of one tensor, or of queries and keys with their own tables or not."""
    dtype, d, h, hk = dtype_of(r), r.choice([2, 6, 16, 18]), r.choice([1, 2]), r.choice([1, 3])
    batch, seqlen = r.choice([0, 1, 2]), r.choice([0, 1, 3])
    pool = {name: r.choice([False, True]) for name in ("interleaved", "inplace", "conjugate")}
    packed = r.choice([False, True]) if packed is None else packed
    lead = (batch, seqlen)
    pool.update(cu_seqlens=None, max_seqlen=None)
    if packed:
        lengths = [r.randrange(seqlen + 1) for _ in range(batch)]
        lead = (sum(lengths) + r.choice([0, 2]),)
        pool.update(cu_seqlens=offsets(lengths), max_seqlen=seqlen)
    offset = r.choice([0, 2])
    of_sequences = indices([r.randrange(3) for _ in range(batch)])
    pool["seqlen_offsets"] = r.choice([offset, of_sequences, of_sequences.long()])
    length = seqlen + 2 + r.choice([0, 1])
    tables(r, pool, dtype, length, r.randrange(1, d // 2 + 1), ("cos", "sin", "cos_k", "sin_k"))
    if r.choice([False, True]):
        pool.update(cos_k=None, sin_k=None)
    shapes = dict.fromkeys(("x", "out"), (*lead, h, d)) | dict.fromkeys(
        ("k", "k_out"), (*lead, hk, d)
    )
    pool.update(tensors(r, dtype, shapes))
    return pool


def rotary_operator(r):
    """Of the library's function: positions as a tensor or a number."""
    pool = rotary_pool(r)
    offset = pool["seqlen_offsets"]
    is_number = isinstance(offset, int)
    pool["seqlen_offsets"], pool["seqlen_offset"] = (None, offset) if is_number else (offset, 0)
    pool["max_seqlen"] = pool["max_seqlen"] or 0
    if r.choice([False, True]):
        pool.update(k=None, k_out=None, cos_k=None, sin_k=None)
    return pool


def rotary_packed_pool(r, as_heads=None):
    """Of qkv and kv: (batch, seqlen, 3 or 2, nheads, headdim), or the heads side by side."""
    pool = rotary_pool(r, packed=False)
    batch, seqlen, h, d = pool["x"].shape
    dtype = pool["x"].dtype
    pool["kv"] = tensor(r, (batch, seqlen, 2, h, d), dtype)
    as_heads = r.choice([False, True]) if as_heads is None else as_heads
    shape = (2 * h + 2 * h, d) if as_heads else (3, h, d)
    pool["qkv"] = tensor(r, (batch, seqlen, *shape), dtype)
    pool["num_heads_q"] = 2 * h if as_heads else None
    return pool


def rotary_qkv_operator(r):
    pool = rotary_packed_pool(r, as_heads=True)
    offset = pool["seqlen_offsets"]
    is_number = isinstance(offset, int)
    pool["seqlen_offsets"], pool["seqlen_offset"] = (None, offset) if is_number else (offset, 0)
    return pool


def loss_pool(r, lead=None):
    dtype, classes = dtype_of(r), r.choice([1, 3, 8, 17])
    lead = r.choice([(), (0,), (3,), (2, 2)]) if lead is None else lead
    pool = tensors(r, dtype, {"logits": (*lead, classes), "dlogits": (*lead, classes)})
    pool["ignore_index"] = r.choice([-100, 0])
    labels = [r.choice([pool["ignore_index"], r.randrange(classes)]) for _ in range(20)]
    numel = torch.Size(lead).numel()
    kind = r.choice([torch.int32, torch.int64])
    pool["labels"] = torch.tensor(labels[:numel], dtype=kind).view(lead)
    pool["precomputed_lse"] = maybe(r, pool["logits"].float().logsumexp(-1))
    is_plain = pool["precomputed_lse"] is not None
    pool["label_smoothing"] = 0.0 if is_plain else r.choice([0.0, 0.1])
    pool["logit_scale"] = 1.0 if is_plain else r.choice([1.0, 0.5])
    pool["lse_square_scale"] = r.choice([0.0, 0.1])
    pool["process_group"] = None
    return pool


def loss_matrices(r):
    rows = r.choice([0, 1, 3, 20])
    pool = loss_pool(r, (rows,))
    classes = pool["logits"].shape[1]
    pool.update(class_start=0, classes_before=0, num_classes=classes, before=None)
    if pool["precomputed_lse"] is None and r.choice([False, True]):
        pool.update(class_start=2, classes_before=2, num_classes=classes + 2)
    pool["state"] = tensor(r, (rows, 4))
    pool["state"][:, 1].abs_()
    pool.update(tensors(r, FP32, dict.fromkeys(("losses", "z_losses", "dlosses"), (rows,))))
    if pool["classes_before"] > 0:
        pool["before"] = pool["state"].clone()
    return pool


def linear_loss_pool(r):
    pool = loss_pool(r)
    features = r.choice([1, 4])
    *lead, classes = pool["logits"].shape
    dtype = pool["logits"].dtype
    pool["hidden"] = tensor(r, (*lead, features), dtype)
    pool["weight"] = tensor(r, (classes, features), dtype)
    pool["bias"] = maybe(r, tensor(r, (classes,), dtype))
    pool["reduction"] = r.choice(["mean", "sum", "none"])
    pool["return_z_loss"] = r.choice([False, True])
    pool["sum_in_fp32"] = r.choice([None, False, True])
    return pool


def dense_layers_pool(r):
    dtype, lead = dtype_of(r), r.choice([(), (0,), (3,), (2, 2)])
    features, hidden, out = (r.choice([1, 4, 5]) for _ in range(3))
    pool = tensors(
        r,
        dtype,
        {
            "x": (*lead, features),
            "weight": (hidden, features),
            "weight1": (hidden, features),
            "weight2": (out, hidden),
            "grad_output": (*lead, hidden),
            "act_input": (*lead, features),
        },
    )
    for name, size in (("bias", hidden), ("bias1", hidden), ("bias2", out)):
        pool[name] = maybe(r, tensor(r, (size,), dtype))
    for name in ("return_residual", "save_pre_act", "sequence_parallel", "save_act_input"):
        pool[name] = r.choice([False, True])
    pool["activation"] = r.choice(["gelu_approx", "relu", "sqrelu"])
    pool["checkpoint_lvl"], pool["heuristic"] = r.randrange(3), r.choice([0, "auto"])
    pool["process_group"] = None
    return pool


def triton_linear_pool(r):
    pool = dense_layers_pool(r)
    pool["activation"] = r.choice(["id", "gelu", "gelu_approx", "squared_relu", "leaky_relu"])
    return pool


def _function(function, arguments, pool, **options):
    options = {"differentiable": True, **options}
    return OperatorEntry(
        function.__name__, function, pool, arguments.split(), keywords=True, **options
    )


def _without_gradient(function, arguments, pool, **options):
    return _function(function, arguments, pool, differentiable=False, **options)


def _product(function, arguments, pool):
    return _function(function, arguments, pool, exact=False)


def _by_position(function, name, arguments, pool, **options):
    return OperatorEntry(name, function, pool, arguments.split(), **options)


def _torch_operator(name, arguments, pool, written=()):
    function = getattr(torch.ops.flash_attn, name)
    arguments = arguments.split()
    return OperatorEntry(f"torch.ops.{name}", function, pool, arguments, written, keywords=True)


def _library(name, arguments, pool, written):
    function = bind(name, arguments)
    return OperatorEntry(f"lib.{name}", function, pool, arguments.split(), tuple(written.split()))


_NORM = "rowscale rowscale_const colscale x0_subset out_subset weight bias weight1 bias1 epsilon "
_NORM += "p_dropout rng_state is_rms_norm zero_centered_weight"
_NORM_OPERATOR = "rowscale colscale x0_subset out_subset weight bias weight1 bias1 rowscale_const "
_NORM_OPERATOR += "epsilon dropout_p is_rms_norm zero_centered_weight"
_NORM_COLUMNS = "dweight dbias dweight1 dbias1 dcolscale"
_ADD_NORM = "x0 residual weight bias dropout_p epsilon rowscale layerscale prenorm "
_ADD_NORM += "residual_in_fp32 return_dropout_mask"
_SUBSET = "x0 residual weight bias dropout_p epsilon layerscale x0_subset out_subset "
_SUBSET += "rowscale_const out_numrows prenorm residual_in_fp32 return_dropout_mask"
_PARALLEL = "x0 x1 residual weight0 bias0 weight1 bias1 dropout_p epsilon prenorm "
_PARALLEL += "residual_in_fp32 return_dropout_mask"
_NORM_FN = "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm "
_NORM_FN += "residual_in_fp32 zero_centered_weight return_dropout_mask out_dtype"
_LINEAR_NORM = "x norm_weight norm_bias linear_weight linear_bias residual eps prenorm "
_LINEAR_NORM += "residual_in_fp32 is_rms_norm"
_ROTARY = "x cos sin interleaved seqlen_offsets cu_seqlens max_seqlen"
_QKV = "cos sin cos_k sin_k interleaved seqlen_offsets num_heads_q"
_OF_TOKENS = "cos sin seqlen_offsets seqlen_offset cu_seqlens max_seqlen interleaved conjugate"
_OF_QKV = "cos sin cos_k sin_k seqlen_offsets seqlen_offset interleaved conjugate num_heads_q"
_LOSS = "label_smoothing logit_scale lse_square_scale ignore_index"
_LOSS_OPTIONS = f"{_LOSS} class_start num_classes"
_GROUP = "process_group sequence_parallel"

OPERATOR_ENTRIES = [
    _function(activations.bias_gelu, "y bias", activation_pool),
    _function(activations.swiglu, "x y", activation_pool),
    _function(activations.gated, "x y activation", activation_pool),
    _function(activations.gelu_fwd, "x", activation_pool),
    _function(activations.sqrelu_fwd, "x", activation_pool),
    _without_gradient(activations.bias_gelu_back, "g y bias", activation_pool),
    _without_gradient(activations.bias_act_bwd, "g y bias activation", activation_pool),
    _without_gradient(activations.gelu_bwd, "g x", activation_pool),
    _without_gradient(activations.relu_bwd, "g x", activation_pool),
    _without_gradient(activations.sqrelu_bwd, "g x", activation_pool),
    _without_gradient(activations.swiglu_bwd, "x y g", activation_pool),
    _function(layer_norm.dropout_add_layer_norm, _ADD_NORM, weighted_norm_pool),
    _function(layer_norm.dropout_add_layer_norm_subset, _SUBSET, subset_pool),
    _function(layer_norm.dropout_add_layer_norm_parallel_residual, _PARALLEL, norm_pool),
    _function(layer_norm.layer_norm, "x weight bias epsilon", weighted_norm_pool),
    _function(rms_norm.dropout_add_rms_norm, _ADD_NORM, weighted_norm_pool),
    _function(rms_norm.dropout_add_rms_norm_subset, _SUBSET, subset_pool),
    _function(rms_norm.dropout_add_rms_norm_parallel_residual, _PARALLEL, norm_pool),
    _function(rms_norm.rms_norm, "x weight epsilon", weighted_norm_pool),
    _function(norms.layer_norm_fn, f"{_NORM_FN} is_rms_norm", norm_pool),
    _function(norms.rms_norm_fn, _NORM_FN, norm_pool),
    _product(norms.layer_norm_linear_fn, _LINEAR_NORM, norm_pool),
    _function(apply_rotary, f"{_ROTARY} conjugate", rotary_pool),
    _function(rotary_layers.apply_rotary_emb, _ROTARY, rotary_pool),
    _without_gradient(apply_rotary, f"{_ROTARY} inplace conjugate", rotary_pool, written=("x",)),
    _without_gradient(
        rotary_layers.apply_rotary_emb_qkv_, f"qkv {_QKV}", rotary_packed_pool, written=("qkv",)
    ),
    _without_gradient(
        rotary_layers.apply_rotary_emb_kv_,
        "kv cos sin interleaved seqlen_offsets",
        rotary_packed_pool,
        written=("kv",),
    ),
    _function(
        cross_entropy_loss, f"logits labels precomputed_lse {_LOSS} process_group", loss_pool
    ),
    _product(
        linear_cross_entropy_loss,
        f"hidden weight labels bias {_LOSS} reduction process_group return_z_loss sum_in_fp32",
        linear_loss_pool,
    ),
    _product(
        fused_dense.fused_dense_func, f"x weight bias return_residual {_GROUP}", dense_layers_pool
    ),
    _product(
        fused_dense.fused_mlp_func,
        "x weight1 weight2 bias1 bias2 activation save_pre_act return_residual checkpoint_lvl "
        f"heuristic {_GROUP}",
        dense_layers_pool,
    ),
    _by_position(
        FusedDenseSqreluDenseFunc.apply,
        "fused_dense_sqrelu_dense_function",
        "x weight1 bias1 weight2 bias2 checkpoint_lvl",
        dense_layers_pool,
        differentiable=True,
        exact=False,
    ),
    _product(triton_linear_act, "x weight bias activation save_act_input", triton_linear_pool),
    _product(triton_dgrad_act, "grad_output weight activation act_input", triton_linear_pool),
    _torch_operator("activation_fwd", "x bias y activation", activation_matrices),
    _torch_operator("activation_bwd", "dout x bias y activation with_dbias", activation_matrices),
    _torch_operator(
        "layer_norm_fwd",
        f"x0 x1 residual {_NORM_OPERATOR} out_numrows out_dtype residual_dtype wants_x wants_mask",
        norm_forward_operator,
    ),
    _torch_operator(
        "layer_norm_bwd",
        f"x dout dout1 dx x0 mean rstd rng_state {_NORM_OPERATOR} x0_numrows x0_dtype wants_dx1 "
        "residual_dtype out_dtype",
        norm_backward_operator,
    ),
    _torch_operator("rotary", f"x {_OF_TOKENS}", rotary_operator),
    _torch_operator("rotary_", f"x {_OF_TOKENS}", rotary_operator, ("x",)),
    _torch_operator("rotary_qkv", f"qkv {_OF_QKV}", rotary_qkv_operator),
    _torch_operator("rotary_qkv_", f"qkv {_OF_QKV}", rotary_qkv_operator, ("qkv",)),
    _torch_operator(
        "cross_entropy_fwd",
        f"logits labels precomputed_lse before {_LOSS_OPTIONS} classes_before",
        loss_matrices,
    ),
    _torch_operator(
        "cross_entropy_bwd", f"dlosses logits labels state {_LOSS_OPTIONS}", loss_matrices
    ),
    _torch_operator(
        "cross_entropy_bwd_",
        f"dlosses logits labels state {_LOSS_OPTIONS}",
        loss_matrices,
        ("logits",),
    ),
    _library("activation_fwd", "x bias y activation out", activation_matrices, "out"),
    _library(
        "activation_bwd", "dout x bias y activation dx dy dbias", activation_matrices, "dx dy dbias"
    ),
    _library(
        "layer_norm_fwd",
        f"x0 x1 residual {_NORM} out out1 x dropout_mask dropout_mask1 mean rstd",
        norm_matrices,
        "out out1 x dropout_mask dropout_mask1 mean rstd",
    ),
    _library(
        "layer_norm_bwd",
        f"x dout dout1 dx x0 mean rstd {_NORM} dx0 dx1 dresidual {_NORM_COLUMNS} out",
        norm_backward_matrices,
        f"dx0 dx1 dresidual {_NORM_COLUMNS} out",
    ),
    _library(
        "rotary",
        "x out k k_out cos sin cos_k sin_k seqlen_offsets seqlen_offset cu_seqlens max_seqlen "
        "interleaved conjugate",
        rotary_operator,
        "out k_out",
    ),
    _library(
        "xentropy_fwd",
        f"logits labels precomputed_lse {_LOSS_OPTIONS} classes_before state losses z_losses",
        loss_matrices,
        "state losses z_losses",
    ),
    _library(
        "xentropy_bwd",
        f"dlosses logits labels state {_LOSS_OPTIONS} dlogits",
        loss_matrices,
        "dlogits",
    ),
]
