"""Multi-head attention with its projections, for training and for generation with a cache."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn._arguments import as_int, check_optional, check_tensors
from flash_attn.flash_attn_interface import (  # noqa: F401  (other packages import some from here)
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules._inner_attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.modules._kv_cache import cache_rows, cached_lengths, check_room, update_kv_cache
from flash_attn.ops.fused_dense import ColumnParallelLinear, RowParallelLinear
from flash_attn.utils.distributed import get_dim_for_local_rank, group_rank, group_size

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
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


class _Heads(NamedTuple):
    """The heads of one process."""

    num_heads: int
    num_heads_kv: int
    head_dim: int
    alibi_slopes: list[float]

    @property
    def features(self) -> int:
        """Size of the packed projection of queries, keys and values."""
        return (self.num_heads + 2 * self.num_heads_kv) * self.head_dim


def _checked_heads(embed_dim, num_heads, num_heads_kv, use_alibi: bool) -> _Heads:
    """Return all heads of the layer.

    Raises:
        ValueError: a number is not positive, or does not divide another that it should.
    """
    embed_dim, num_heads = as_int("embed_dim", embed_dim), as_int("num_heads", num_heads)
    num_heads_kv = num_heads if num_heads_kv is None else as_int("num_heads_kv", num_heads_kv)
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads, got {embed_dim} and {num_heads}"
        )
    if num_heads_kv < 1 or num_heads % num_heads_kv:
        raise ValueError(
            f"num_heads must be a positive multiple of num_heads_kv, got {num_heads} and "
            f"{num_heads_kv}"
        )
    slopes = get_alibi_slopes(num_heads) if use_alibi else []
    return _Heads(num_heads, num_heads_kv, embed_dim // num_heads, slopes)


def _local_heads(heads: _Heads, process_group) -> _Heads:
    """Return this process's heads: whole groups of queries with their key-value head.

    Raises:
        ValueError: there are more processes than key-value heads.
    """
    size, rank = group_size(process_group), group_rank(process_group)
    if size > heads.num_heads_kv:
        raise ValueError(
            f"num_heads_kv ({heads.num_heads_kv}) must be at least the number of processes in "
            f"process_group ({size})"
        )
    shares = [get_dim_for_local_rank(heads.num_heads_kv, size, i) for i in range(rank + 1)]
    queries = heads.num_heads // heads.num_heads_kv
    end, count = sum(shares) * queries, shares[-1] * queries
    return _Heads(count, shares[-1], heads.head_dim, heads.alibi_slopes[end - count : end])


class _Attention(nn.Module):
    """The heads of one process between the projections: rotation, attention, cache."""

    def __init__(
        self,
        heads: _Heads,
        *,
        dropout: float,
        softmax_scale: Optional[float],
        causal: bool,
        layer_idx: Optional[int],
        rotary_emb_dim: int,
        rotary_emb_base: float,
        rotary_emb_scale_base: Optional[float],
        rotary_emb_interleaved: bool,
        window_size: tuple[int, int],
        use_flash_attn: bool,
        checkpointing: bool,
        device,
    ):
        super().__init__()
        self._heads = heads
        self.head_dim = heads.head_dim
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        if rotary_emb_dim > 0:
            self._check_rotary_dim(rotary_emb_dim)
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        score = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        score["window_size"] = window_size
        if heads.alibi_slopes:
            slopes = torch.tensor(heads.alibi_slopes, dtype=torch.float32, device=device)
            score["alibi_slopes"] = slopes
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**score)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**score)

    def _check_rotary_dim(self, rotary_emb_dim: int) -> None:
        if rotary_emb_dim % 2 or rotary_emb_dim > self.head_dim:
            raise ValueError(
                f"rotary_emb_dim must be even and at most the head dim {self.head_dim}, got "
                f"{rotary_emb_dim}"
            )

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None
    ) -> Tensor:
        """Return a cache for ``inference_params.key_value_memory_dict[layer_idx]``.

        Args:
            batch_size: number of sequences.
            max_seqlen: tokens of the longest one.
            dtype: default that of the output projection.

        Returns:
            ``(batch_size, max_seqlen, 2, nheads_k, headdim)``, not initialised, on the output
            projection's device; nheads_k are this process's.
        """
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self._heads.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def _check_call(self, inference_params, options: dict) -> None:
        """Raise for arguments of forward that do not go together."""
        cu_seqlens = options.get("cu_seqlens")
        check_optional(cu_seqlens=cu_seqlens)
        if cu_seqlens is not None and not self.use_flash_attn:
            raise ValueError("cu_seqlens needs use_flash_attn=True")
        if cu_seqlens is not None and options.get("max_seqlen") is None:
            raise ValueError("cu_seqlens needs max_seqlen")
        if options.get("key_padding_mask") is not None and self.use_flash_attn:
            raise ValueError(
                "key_padding_mask needs use_flash_attn=False; with it, remove the padding "
                "(flash_attn.bert_padding.unpad_input) and give cu_seqlens and max_seqlen"
            )
        if inference_params is None:
            return
        if self.layer_idx is None:
            raise ValueError("inference_params needs a module with layer_idx")
        given = [name for name, x in options.items() if x is not None]
        if given:
            raise ValueError(f"inference_params does not go together with {', '.join(given)}")

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Return views q ``(..., nheads, headdim)`` and kv ``(..., 2, nheads_k, headdim)``."""
        count = self._heads.num_heads
        return qkv[..., :count, :], qkv[..., count:, :].unflatten(-2, (2, -1))

    def _attend(self, qkv: Tensor, inference_params, options: dict) -> Tensor:
        """Attend within sequences.

        Args:
            qkv: ``(batch, seqlen, features)`` or, packed, ``(total, features)``.
            inference_params: with a cache, or None.
            options: arguments of the inner attention's forward.

        Returns:
            ``(..., nheads * headdim)``.
        """
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        if inference_params is not None:
            q, kv = self._split(qkv)
            attended = self._apply_rotary_update_kvcache_attention(q, kv, inference_params)
            return attended.flatten(-2)
        if self.rotary_emb_dim > 0:
            qkv = self._rotated(qkv, options)
        return self._attend_self(qkv, options).flatten(-2)

    def _attend_self(self, qkv: Tensor, options: dict) -> Tensor:
        """Attend without a cache; qkv is ``(..., nheads + 2 * nheads_k, headdim)``."""
        groups = self._heads.num_heads // self._heads.num_heads_kv
        if groups == 1:
            return self._run(self.inner_attn, qkv.unflatten(-2, (3, -1)), **options)
        q, kv = self._split(qkv)
        if not self.use_flash_attn:  # CrossAttention takes queries to end where padding begins
            whole = torch.cat((q.unsqueeze(-3), kv.repeat_interleave(groups, -2)), -3)
            return self._run(self.inner_attn, whole, **options)
        if options.get("cu_seqlens") is not None:
            names = ("cu_seqlens", "max_seqlen")
            options = {**{name + "_k": options[name] for name in names}, **options}
        return self._run(self.inner_cross_attn, q, kv, **options)

    def _run(self, attention: nn.Module, *tensors: Tensor, **options) -> Tensor:
        if self.checkpointing:
            return checkpoint(attention, *tensors, use_reentrant=False, **options)
        return attention(*tensors, **options)

    def _rotated(self, qkv: Tensor, options: dict) -> Tensor:
        """Turn queries and keys of ``(..., nheads + 2 * nheads_k, headdim)`` in place."""
        count, cu_seqlens = self._heads.num_heads, options.get("cu_seqlens")
        if cu_seqlens is None:
            return self.rotary_emb(qkv, num_heads_q=count)
        rotary, max_seqlen = self.rotary_emb, as_int("max_seqlen", options["max_seqlen"])
        rotary._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        tables = (rotary._cos_cached, rotary._sin_cached)
        tables_k = (rotary._cos_k_cached, rotary._sin_k_cached) if rotary.scale_base else tables
        where = {"inplace": True, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        where["interleaved"] = rotary.interleaved
        apply_rotary_emb(qkv[:, :count], *tables, **where)
        apply_rotary_emb(qkv[:, count : count + self._heads.num_heads_kv], *tables_k, **where)
        return qkv

    def _update_kv_cache(self, kv: Tensor, inference_params) -> Tensor:
        """``update_kv_cache`` of this layer."""
        return update_kv_cache(kv, inference_params, self.layer_idx)

    def _apply_rotary_update_kvcache_attention(
        self, q: Tensor, kv: Tensor, inference_params
    ) -> Tensor:
        """Turn q and kv at their positions, append kv to the cache and attend over it.

        Args:
            q: ``(batch, seqlen, nheads, headdim)``, possibly overwritten.
            kv: ``(batch, seqlen, 2, nheads_k, headdim)``, likewise.

        Returns:
            Of q's shape.
        """
        if self.rotary_emb_dim == 0:
            return self._update_kvcache_attention(q, kv, inference_params)
        rotary = self.rotary_emb
        # The tables of one length throughout: those of xPos are not the same for another one.
        capacity = cache_rows(kv, inference_params, self.layer_idx).shape[1]
        rotary._update_cos_sin_cache(capacity, device=q.device, dtype=q.dtype)
        if self._kernel_rotates(q.shape[1]):
            return self._attend_cache(
                q,
                kv,
                inference_params,
                rotary_cos=rotary._cos_cached,
                rotary_sin=rotary._sin_cached,
                rotary_interleaved=rotary.interleaved,
            )
        length = cached_lengths(q.shape[0], inference_params)
        q, kv = rotary(q, kv, seqlen_offset=length, max_seqlen=capacity)
        return self._update_kvcache_attention(q, kv, inference_params)

    def _kernel_rotates(self, seqlen: int) -> bool:
        """Whether flash_attn_with_kvcache turns queries and keys as the module does.

        Without any mask it takes all queries to be at one position.
        """
        if not self.use_flash_attn or self.rotary_emb.scale_base is not None:
            return False
        left, right = self.inner_cross_attn.window_size
        return seqlen == 1 or self.causal or left >= 0 or right >= 0

    def _update_kvcache_attention(self, q: Tensor, kv: Tensor, inference_params) -> Tensor:
        """Append kv to the cache and attend over it: as the function above, without turning."""
        if self.use_flash_attn:
            return self._attend_cache(q, kv, inference_params)
        length = cached_lengths(q.shape[0], inference_params)
        whole = self._update_kv_cache(kv, inference_params)
        if not isinstance(length, Tensor):
            return self.inner_cross_attn(q, whole)
        place = torch.arange(whole.shape[1], device=q.device)
        is_token = place < (length + kv.shape[1])[:, None]
        return self.inner_cross_attn(q, whole, key_padding_mask=is_token)

    def _attend_cache(self, q: Tensor, kv: Tensor, inference_params, **rotary) -> Tensor:
        cache = cache_rows(kv, inference_params, self.layer_idx)
        length = cached_lengths(q.shape[0], inference_params)
        check_room(length, kv.shape[1], cache)
        inner = self.inner_cross_attn
        return flash_attn_with_kvcache(
            q,
            *cache.unbind(2),
            *kv.unbind(2),
            cache_seqlens=length,
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=inner.alibi_slopes,
            **rotary,
        )


def _depthwise(channels: int, **factory) -> nn.Conv1d:
    """A convolution of each channel over its token and the two before; cut the last two outputs."""
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels, **factory)


def _convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Apply ``_depthwise`` to ``(batch, seqlen, channels)``."""
    return conv(x.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()


class MHA(_Attention):
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
    ):
        """Make the module.

        Parameters: ``Wqkv`` (rows: all heads' queries, then keys, then values) or, with
        ``cross_attn``, ``Wq`` and ``Wkv``; ``out_proj``; with ``dwconv`` ``dwconv_qkv``, or
        ``dwconv_q`` and ``dwconv_kv`` where queries are apart or have more heads.

        Args:
            embed_dim: size of a token, a multiple of ``num_heads``.
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

        Raises:
            ValueError: an argument does not fit another; the message names it.
        """
        heads = _checked_heads(embed_dim, num_heads, num_heads_kv, use_alibi)
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError("rotary_emb_dim must be 0 with cross_attn")
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
            device=device,
        )
        self.embed_dim = embed_dim
        self.num_heads, self.num_heads_kv = heads.num_heads, heads.num_heads_kv
        self.cross_attn, self.dwconv, self.return_residual = cross_attn, dwconv, return_residual
        factory = {"device": device, "dtype": dtype}
        self._make_projections(bias=qkv_proj_bias, **factory)
        if dwconv:
            self._make_convolutions(**factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    @property
    def _kv_features(self) -> int:
        return 2 * self.num_heads_kv * self.head_dim

    def _make_projections(self, **options) -> None:
        linear = LinearResidual if self.return_residual else nn.Linear
        if self.cross_attn:
            self.Wq = nn.Linear(self.embed_dim, self.embed_dim, **options)
            self.Wkv = linear(self.embed_dim, self._kv_features, **options)
        else:
            self.Wqkv = linear(self.embed_dim, self._heads.features, **options)

    def _make_convolutions(self, **factory) -> None:
        if not self.cross_attn and self.num_heads == self.num_heads_kv:
            self.dwconv_qkv = _depthwise(self._heads.features, **factory)
        else:
            self.dwconv_q = _depthwise(self.embed_dim, **factory)
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
        q, kv = qkv.split([self.embed_dim, self._kv_features], -1)
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


class ParallelMHA(_Attention):
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
        heads = _checked_heads(embed_dim, num_heads, num_heads_kv, use_alibi)
        local = _local_heads(heads, process_group)
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
            device=device,
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
            embed_dim,
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
