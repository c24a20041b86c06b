"""Multi-head attention with its projections, for training and for generation with a cache."""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn._arguments import as_int, check_optional, check_subset, check_tensors
from flash_attn._untouched import is_untouched
from flash_attn.flash_attn_interface import (  # noqa: F401  (other packages import some from here)
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.modules._heads import (
    PLAIN_HEADS,
    HeadAttention,
    HeadOptions,
    checked_heads,
    local_heads,
)
from flash_attn.modules._inner_attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.modules._kv_cache import update_kv_cache
from flash_attn.ops.fused_dense import ColumnParallelLinear, RowParallelLinear

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "HeadOptions",
    "LinearResidual",
    "ParallelMHA",
    "SelfAttention",
    "get_alibi_slopes",
]

_update_kv_cache = update_kv_cache


class LinearResidual(nn.Linear):
    """``nn.Linear`` that returns its input, too: ``(output, input)``."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input), input


_TAPS = 3


def _depthwise(channels: int, **factory) -> nn.Conv1d:
    """The parameters of a convolution of each channel over its token and the two before."""
    padding = {"kernel_size": _TAPS, "padding": _TAPS - 1}
    return nn.Conv1d(channels, channels, groups=channels, **padding, **factory)


def _convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Apply ``_depthwise`` to ``(batch, seqlen, channels)``, without the outputs after the end.

    By products and sums, rounded once: torch's own takes seconds on a CPU in half precision.
    """
    if not is_untouched(conv, nn.Conv1d):
        return conv(x.mT)[..., : x.shape[1]].mT
    dtype, seqlen = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    late, weight = F.pad(x, (0, 0, _TAPS - 1, 0)).to(dtype), conv.weight[:, 0].to(dtype)
    out = conv.bias.to(dtype)
    for i in range(_TAPS):
        out = out + late[:, i : i + seqlen] * weight[:, i]
    return out.to(x.dtype)


class MHA(HeadAttention):
    """Multi-head self- or cross-attention."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: Optional[int] = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: Optional[float] = None,
        causal: bool = False,
        layer_idx: Optional[int] = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: Optional[float] = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device=None,
        dtype=None,
        *,
        head_options: HeadOptions = PLAIN_HEADS,
    ):
        """Make the module.

        Parameters: ``Wqkv`` (rows: all heads' queries, then keys, then values) or, with
        ``cross_attn``, ``Wq`` and ``Wkv``; ``out_proj``; with ``dwconv`` ``dwconv_qkv``, or
        ``dwconv_q`` and ``dwconv_kv`` where queries are apart or have more heads.

        Args:
            embed_dim: size of a token, a multiple of ``num_heads`` without a head dim of its own.
            num_heads: of queries.
            num_heads_kv: of keys and values, divides ``num_heads``; default ``num_heads``.
            cross_attn: whether queries and keys may come from different tokens.
            qkv_proj_bias, out_proj_bias: whether the projections have a bias.
            dropout: probability to drop an attention weight in training.
            softmax_scale: default ``head_dim ** -0.5``.
            causal: whether a query sees no later key.
            layer_idx: the key of this layer's cache; needed with ``inference_params``.
            dwconv: whether a causal depthwise convolution over three tokens follows the projection.
            rotary_emb_dim: elements of a head that rotary embedding turns; 0: none. Even; not with
                ``cross_attn``.
            rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: base, scale_base and
                interleaved of ``flash_attn.layers.rotary.RotaryEmbedding``.
            use_alibi: whether scores have ALiBi biases.
            window_size: (left, right), -1: no limit.
            fused_bias_fc: accepted and without effect.
            use_flash_attn: whether to attend through the kernels (fp16, bf16 or fp32) rather than
                by torch operations.
            return_residual: whether forward returns its input, too.
            checkpointing: whether the backward computes attention again.
            device, dtype: of the parameters.
            head_options: head dim, softcap, sinks, norms of queries and keys, rotary embedding,
                processes that share sequences.

        Raises:
            ValueError: an argument does not fit another; the message names it.
        """
        head_dim = head_options.head_dim
        heads = checked_heads(embed_dim, num_heads, num_heads_kv, use_alibi, head_dim)
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError("rotary_emb_dim must be 0 with cross_attn")
        for name in ("qk_norm", "rotary_emb", "context_parallel") if cross_attn else ():
            if getattr(head_options, name) is not None:
                raise ValueError(f"head_options.{name} must be None with cross_attn")
        if dwconv and head_options.context_parallel is not None:
            raise ValueError("head_options.context_parallel must be None with dwconv")
        super().__init__(
            heads,
            dropout=dropout,
            softmax_scale=softmax_scale,
            causal=causal,
            layer_idx=layer_idx,
            rotary_emb_dim=rotary_emb_dim,
            rotary_emb_base=rotary_emb_base,
            rotary_emb_scale_base=rotary_emb_scale_base,
            rotary_emb_interleaved=rotary_emb_interleaved,
            window_size=window_size,
            use_flash_attn=use_flash_attn,
            checkpointing=checkpointing,
            head_options=head_options,
            device=device,
            dtype=dtype,
        )
        self.embed_dim = embed_dim
        self.num_heads, self.num_heads_kv = heads.num_heads, heads.num_heads_kv
        self.cross_attn, self.dwconv, self.return_residual = cross_attn, dwconv, return_residual
        factory = {"device": device, "dtype": dtype}
        self._make_projections(bias=qkv_proj_bias, **factory)
        if dwconv:
            self._make_convolutions(**factory)
        self.out_proj = nn.Linear(self._q_features, embed_dim, bias=out_proj_bias, **factory)

    @property
    def _q_features(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def _kv_features(self) -> int:
        return 2 * self.num_heads_kv * self.head_dim

    def _make_projections(self, **options) -> None:
        linear = LinearResidual if self.return_residual else nn.Linear
        if self.cross_attn:
            self.Wq = nn.Linear(self.embed_dim, self._q_features, **options)
            self.Wkv = linear(self.embed_dim, self._kv_features, **options)
        else:
            self.Wqkv = linear(self.embed_dim, self._heads.features, **options)

    def _make_convolutions(self, **factory) -> None:
        if not self.cross_attn and self.num_heads == self.num_heads_kv:
            self.dwconv_qkv = _depthwise(self._heads.features, **factory)
        else:
            self.dwconv_q = _depthwise(self._q_features, **factory)
            self.dwconv_kv = _depthwise(self._kv_features, **factory)

    def _projected(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """Return ``projection(x)`` without the residual."""
        out = projection(x)
        return out[0] if isinstance(projection, LinearResidual) else out

    def _project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values, ``(..., features)``."""
        qkv = self._projected(self.Wqkv, x)
        if not self.dwconv:
            return qkv
        if self.num_heads == self.num_heads_kv:
            return _convolved(self.dwconv_qkv, qkv)
        q, kv = qkv.split([self._q_features, self._kv_features], -1)
        return torch.cat((_convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)), -1)

    def _project_apart(self, x: Tensor, x_kv: Optional[Tensor], subset) -> tuple[Tensor, Tensor]:
        """Return q ``(..., nheads, headdim)`` and kv ``(..., 2, nheads_k, headdim)``."""
        kv = self._projected(self.Wkv, x if x_kv is None else x_kv)
        x = x if subset is None or self.dwconv else x[..., subset, :]
        q = self.Wq(x)
        if self.dwconv:
            q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
            q = q if subset is None else q[..., subset, :]
        sizes = (-1, self.head_dim)
        return q.unflatten(-1, sizes), kv.unflatten(-1, (2, *sizes))

    def _attend_apart(self, q: Tensor, kv: Tensor, inference_params, options: dict) -> Tensor:
        if inference_params is not None:
            return self._update_kvcache_attention(q, kv, inference_params).flatten(-2)
        return self._run(self.inner_cross_attn, q, kv, **options).flatten(-2)

    def _check_tokens(self, x, x_kv, mixer_subset, cu_seqlens, inference_params) -> None:
        check_tensors(x=x)
        check_optional(x_kv=x_kv)
        dims = 3 if cu_seqlens is None else 2
        for name, tokens in (("x", x), ("x_kv", x_kv)):
            if tokens is not None and (tokens.dim() != dims or tokens.shape[-1] != self.embed_dim):
                sizes = "batch, seqlen" if dims == 3 else "total"
                raise ValueError(
                    f"{name} must be ({sizes}, {self.embed_dim})"
                    f"{' with cu_seqlens' if dims == 2 else ''}, got {tuple(tokens.shape)}"
                )
        for name, value in (("x_kv", x_kv), ("mixer_subset", mixer_subset)):
            if value is not None and not self.cross_attn:
                raise ValueError(f"{name} needs a module with cross_attn=True")
        check_subset("mixer_subset", mixer_subset)
        if self.dwconv and (cu_seqlens is not None or inference_params is not None):
            given = "inference_params" if cu_seqlens is None else "cu_seqlens"
            raise ValueError(f"{given} needs a module with dwconv=False")

    def forward(
        self,
        x: Tensor,
        x_kv: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
        max_seqlen: Optional[int] = None,
        mixer_subset=None,
        inference_params=None,
        **kwargs,
    ) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """Project, attend, project.

        Args:
            x: ``(batch, seqlen, embed_dim)``, or with ``cu_seqlens`` ``(total, embed_dim)``.
            x_kv: tokens that keys and values come from, ``(batch, seqlen_k, embed_dim)`` or
                ``(total_k, embed_dim)``; None: x. Only with ``cross_attn``.
            key_padding_mask: ``(batch, seqlen_k)``, True: a token, False: padding. Only without
                ``use_flash_attn``.
            cu_seqlens: int32 ``(batch + 1,)``, where packed sequences start and end. Only with
                ``use_flash_attn``. Where ``x_kv`` is given, its own are ``cu_seqlens_k`` and
                ``max_seqlen_k``.
            max_seqlen: the longest packed sequence or more.
            mixer_subset: a slice or index of the tokens that queries come from, such as
                ``slice(0, 1)``; the others are keys alone. Only with ``cross_attn``.
            inference_params: what a generating model knows of its cache, an object with the
                attributes of ``flash_attn.utils.generation.InferenceParams``; x is then appended
                to what the cache has, and no gradient flows through it.
            **kwargs: more arguments of the inner attention: ``causal``, ``cu_seqlens_k``,
                ``max_seqlen_k``.

        Returns:
            ``(batch, seqlen, embed_dim)`` or ``(total, embed_dim)``; with ``return_residual`` this
            and x.

        Raises:
            ValueError: arguments do not go together, or a shape is wrong.
            TypeError: an argument is not of its kind, or unknown to the inner attention.
            RuntimeError: an argument that the kernels do not take; the message names it.
        """
        self._check_tokens(x, x_kv, mixer_subset, cu_seqlens, inference_params)
        packed = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        options = {"key_padding_mask": key_padding_mask, **packed, **kwargs}
        self._check_call(inference_params, options)
        for name in ("key_padding_mask",) if self.use_flash_attn else packed:
            del options[name]
        if self.cross_attn:
            q, kv = self._project_apart(x, x_kv, mixer_subset)
            context = self._attend_apart(q, kv, inference_params, options)
        else:
            context = self._attend(self._project(x), inference_params, options)
        out = self.out_proj(context)
        return (out, x) if self.return_residual else out


class ParallelMHA(HeadAttention):
    """Multi-head self-attention whose heads are spread over the processes of a group."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group,
        num_heads_kv: Optional[int] = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: Optional[float] = None,
        causal: bool = False,
        layer_idx: Optional[int] = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: Optional[float] = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device=None,
        dtype=None,
        *,
        head_options: HeadOptions = PLAIN_HEADS,
    ):
        """Make the module.

        ``Wqkv`` has the rows, and ``out_proj`` the columns, of this process's heads: whole groups
        of queries with their key-value head, the first processes one group more where they do not
        divide the groups.

        Args:
            process_group: the group; at most ``num_heads_kv`` processes.
            sequence_parallel: whether each process holds a share of the tokens outside, rather
                than all of them.

        The other arguments are those of ``MHA``.

        Raises:
            ValueError: an argument does not fit another; the message names it.
        """
        head_dim = head_options.head_dim
        heads = checked_heads(embed_dim, num_heads, num_heads_kv, use_alibi, head_dim)
        local = local_heads(heads, process_group)
        super().__init__(
            local,
            dropout=dropout,
            softmax_scale=softmax_scale,
            causal=causal,
            layer_idx=layer_idx,
            rotary_emb_dim=rotary_emb_dim,
            rotary_emb_base=rotary_emb_base,
            rotary_emb_scale_base=rotary_emb_scale_base,
            rotary_emb_interleaved=rotary_emb_interleaved,
            window_size=window_size,
            use_flash_attn=use_flash_attn,
            checkpointing=checkpointing,
            head_options=head_options,
            device=device,
            dtype=dtype,
        )
        self.embed_dim, self.process_group = embed_dim, process_group
        self.num_heads, self.num_heads_kv = heads.num_heads, heads.num_heads_kv
        self.num_heads_per_rank, self.num_heads_kv_per_rank = local.num_heads, local.num_heads_kv
        queries = heads.num_heads // heads.num_heads_kv
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.Wqkv = ColumnParallelLinear(
            embed_dim,
            heads.features,
            process_group,
            bias=qkv_proj_bias,
            multiple_of=(queries + 2) * heads.head_dim,
            **options,
        )
        self.out_proj = RowParallelLinear(
            heads.num_heads * heads.head_dim,
            embed_dim,
            process_group,
            bias=out_proj_bias,
            multiple_of=queries * heads.head_dim,
            **options,
        )

    def forward(
        self, x: Tensor, seqlen: Optional[int] = None, inference_params=None, **kwargs
    ) -> Tensor:
        """Project, attend, project.

        Args:
            x: ``(batch, seqlen, embed_dim)``; with ``seqlen`` ``(batch * seqlen, embed_dim)``, so
                that the processes of a sequence-parallel group, which share the first dimension,
                share tokens rather than sequences; with ``cu_seqlens`` ``(total, embed_dim)``.
            seqlen: length of each sequence.
            inference_params: as for ``MHA``.
            **kwargs: arguments of the inner attention: ``causal``, ``cu_seqlens`` and
                ``max_seqlen`` with ``use_flash_attn``, ``key_padding_mask`` without.

        Returns:
            Of x's shape.

        Raises:
            ValueError: arguments do not go together, or a shape is wrong.
            TypeError: an argument is not of its kind, or unknown to the inner attention.
            RuntimeError: an argument that the kernels do not take; the message names it.
        """
        check_tensors(x=x)
        self._check_call(inference_params, kwargs)
        is_flat = seqlen is not None or kwargs.get("cu_seqlens") is not None
        if x.dim() != (2 if is_flat else 3):
            expected = "(tokens, embed_dim)" if is_flat else "(batch, seqlen, embed_dim)"
            raise ValueError(f"x must be {expected}, got {tuple(x.shape)}")
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = self._in_sequences(qkv, as_int("seqlen", seqlen))
        context = self._attend(qkv, inference_params, kwargs)
        return self.out_proj(context if seqlen is None else context.flatten(0, 1))

    def _in_sequences(self, qkv: Tensor, seqlen: int) -> Tensor:
        if seqlen < 1 or qkv.shape[0] % seqlen:
            raise ValueError(f"seqlen ({seqlen}) must divide x's {qkv.shape[0]} tokens")
        return qkv.unflatten(0, (-1, seqlen))
