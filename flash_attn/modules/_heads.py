"""The heads of one process between the projections of MHA: rotation, attention, cache."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn._arguments import as_int, check_optional
from flash_attn.flash_attn_interface import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules._inner_attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.modules._kv_cache import (
    block_table_of,
    cache_capacity,
    cache_rows,
    cached_lengths,
    check_room,
    packing_of,
    update_kv_cache,
    whole_cache,
)
from flash_attn.modules._packed_cache import append_packed, rotate_packed
from flash_attn.utils.distributed import get_dim_for_local_rank, group_rank, group_size


class Heads(NamedTuple):
    """The heads of one process."""

    num_heads: int
    num_heads_kv: int
    head_dim: int
    alibi_slopes: list[float]

    @property
    def features(self) -> int:
        """Size of the packed projection of queries, keys and values."""
        return (self.num_heads + 2 * self.num_heads_kv) * self.head_dim


class HeadOptions(NamedTuple):
    """What today's models ask of attention beyond MHA's own arguments.

    head_dim: of queries, keys and values; None: ``embed_dim // num_heads``.
    softcap: > 0 replaces a score x by ``softcap * tanh(x / softcap)``.
    sinks: whether each head has a logit without value, the parameter ``sinks`` ``(nheads,)``.
    qk_norm: makes a norm from ``head_dim``: ``q_norm`` and ``k_norm``, of each head's query and key
        before they are turned. Not with ``cross_attn``.
    rotary_emb: in place of the one that MHA makes from its ``rotary_emb_`` arguments. Not with
        ``cross_attn``.
    alibi_scale: by which the slopes of ``use_alibi`` are multiplied.
    context_parallel: a ``flash_attn.distributed.ContextParallel``: the module then gets this
        process's tokens of sequences that it says how processes share; ``cu_seqlens`` and
        ``max_seqlen`` are those of the whole ones. Only with ``use_flash_attn``, without a cache;
        not with ``cross_attn`` or ``dwconv``.
    """

    head_dim: Optional[int] = None
    softcap: float = 0.0
    sinks: bool = False
    qk_norm: Optional[Callable[[int], nn.Module]] = None
    rotary_emb: Optional[RotaryEmbedding] = None
    alibi_scale: float = 1.0
    context_parallel: Optional[Callable] = None


PLAIN_HEADS = HeadOptions()


def checked_heads(embed_dim, num_heads, num_heads_kv, use_alibi: bool, head_dim=None) -> Heads:
    """Return all heads of the layer.

    Raises:
        ValueError: a number is not positive, or does not divide another that it should.
    """
    embed_dim, num_heads = as_int("embed_dim", embed_dim), as_int("num_heads", num_heads)
    num_heads_kv = num_heads if num_heads_kv is None else as_int("num_heads_kv", num_heads_kv)
    if head_dim is not None:
        head_dim = as_int("head_options.head_dim", head_dim)
        if head_dim < 1:
            raise ValueError(f"head_options.head_dim must be positive, got {head_dim}")
    if num_heads < 1 or embed_dim < 1 or (head_dim is None and embed_dim % num_heads):
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads, got {embed_dim} and {num_heads}"
        )
    if num_heads_kv < 1 or num_heads % num_heads_kv:
        raise ValueError(
            f"num_heads must be a positive multiple of num_heads_kv, got {num_heads} and "
            f"{num_heads_kv}"
        )
    slopes = get_alibi_slopes(num_heads) if use_alibi else []
    return Heads(num_heads, num_heads_kv, head_dim or embed_dim // num_heads, slopes)


def local_heads(heads: Heads, process_group) -> Heads:
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
    return Heads(count, shares[-1], heads.head_dim, heads.alibi_slopes[end - count : end])


class HeadAttention(nn.Module):
    """The heads of one process between the projections of MHA and ParallelMHA."""

    def __init__(
        self,
        heads: Heads,
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
        head_options: HeadOptions,
        device,
        dtype,
    ):
        super().__init__()
        self._heads = heads
        self.head_dim = heads.head_dim
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        self.context_parallel = head_options.context_parallel
        if self.context_parallel is not None and not use_flash_attn:
            raise ValueError("head_options.context_parallel needs use_flash_attn=True")
        if head_options.rotary_emb is not None:
            self.rotary_emb = head_options.rotary_emb
            self.rotary_emb_dim = rotary_emb_dim = self.rotary_emb.dim
            self._check_rotary_dim(rotary_emb_dim)
        elif rotary_emb_dim > 0:
            self._check_rotary_dim(rotary_emb_dim)
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        score = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        score.update(window_size=window_size, softcap=head_options.softcap)
        if heads.alibi_slopes:
            slopes = torch.tensor(heads.alibi_slopes, dtype=torch.float32, device=device)
            slopes = slopes * head_options.alibi_scale
            score["alibi_slopes"] = slopes
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**score)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**score)
        self._make_extras(head_options, {"device": device, "dtype": dtype})

    def _make_extras(self, head_options: HeadOptions, factory: dict) -> None:
        """Make the parameters of ``head_options``."""
        self.register_parameter("sinks", None)
        if head_options.sinks:
            self.sinks = nn.Parameter(torch.zeros(self._heads.num_heads, **factory))
        norm = head_options.qk_norm
        self.q_norm = None if norm is None else norm(self.head_dim)
        self.k_norm = None if norm is None else norm(self.head_dim)

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
        if self.context_parallel is not None:
            raise ValueError("inference_params needs head_options.context_parallel=None")
        given = [name for name, x in options.items() if x is not None]
        if given:
            raise ValueError(f"inference_params does not go together with {', '.join(given)}")
        self._check_cache(inference_params)

    def _check_cache(self, inference_params) -> None:
        """Raise ValueError for a cache that this layer cannot read."""
        is_paged = block_table_of(inference_params) is not None
        given = {"block_table": is_paged, "packing": packing_of(inference_params) is not None}
        for name in (name for name, is_given in given.items() if is_given):
            if not self.use_flash_attn:
                raise ValueError(f"inference_params.{name} needs use_flash_attn=True")
        if is_paged and self.rotary_emb_dim > 0 and self.rotary_emb.scale_base is not None:
            raise ValueError("inference_params.block_table needs rotary_emb_scale_base=None")

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
        qkv = self._normed(qkv.unflatten(-1, (-1, self.head_dim)))
        if inference_params is not None:
            q, kv = self._split(qkv)
            attended = self._apply_rotary_update_kvcache_attention(q, kv, inference_params)
            return attended.flatten(-2)
        if self.rotary_emb_dim > 0:
            qkv = self._rotated(qkv, options)
        return self._attend_self(qkv, options).flatten(-2)

    def _normed(self, qkv: Tensor) -> Tensor:
        """Norm queries and keys of ``(..., nheads + 2 * nheads_k, headdim)``, if they are to be."""
        if self.q_norm is None:
            return qkv
        count, count_kv = self._heads.num_heads, self._heads.num_heads_kv
        q, k, v = qkv.split([count, count_kv, count_kv], -2)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), -2)

    def _attend_self(self, qkv: Tensor, options: dict) -> Tensor:
        """Attend without a cache; qkv is ``(..., nheads + 2 * nheads_k, headdim)``."""
        if self.context_parallel is not None:
            return self._attend_shared(qkv, options)
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

    def _attend_shared(self, qkv: Tensor, options: dict) -> Tensor:
        """``_attend_self`` over the tokens of all processes that share the sequences."""
        q, kv = self._split(qkv)
        score = self.inner_attn._score(options.get("causal"), None)
        cu_seqlens = options.get("cu_seqlens")
        if cu_seqlens is None:
            return self._run(self.context_parallel, q, *kv.unbind(-3), **score)
        sequences = (cu_seqlens, cu_seqlens)
        return self._run(self.context_parallel.varlen, q, *kv.unbind(-3), *sequences, **score)

    def _run(self, attention: Callable, *tensors: Tensor, **options) -> Tensor:
        if self.sinks is not None:
            options["s_aux"] = self.sinks
        if self.checkpointing:
            return checkpoint(attention, *tensors, use_reentrant=False, **options)
        return attention(*tensors, **options)

    def _rotated(self, qkv: Tensor, options: dict) -> Tensor:
        """Turn queries and keys of ``(..., nheads + 2 * nheads_k, headdim)`` in place."""
        count, cu_seqlens = self._heads.num_heads, options.get("cu_seqlens")
        if self.context_parallel is not None:
            return self._rotated_in_share(qkv, options)
        if cu_seqlens is None:
            return self.rotary_emb(qkv, num_heads_q=count)
        rotary, max_seqlen = self.rotary_emb, as_int("max_seqlen", options["max_seqlen"])
        all_tables = rotary._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        tables = all_tables[:2]
        tables_k = all_tables[2:4] if rotary.scale_base else tables
        where = {"inplace": True, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        where["interleaved"] = rotary.interleaved
        apply_rotary_emb(qkv[:, :count], *tables, **where)
        apply_rotary_emb(qkv[:, count : count + self._heads.num_heads_kv], *tables_k, **where)
        return qkv

    def _rotated_in_share(self, qkv: Tensor, options: dict) -> Tensor:
        """``_rotated`` at the positions that this process's tokens have in the whole."""
        context, cu_seqlens, rotary = (
            self.context_parallel,
            options.get("cu_seqlens"),
            self.rotary_emb,
        )
        if cu_seqlens is None:
            positions, seqlen = context.position_ids(qkv.shape[1], qkv.device)
        else:
            positions = context.position_ids_varlen(cu_seqlens)
            seqlen = as_int("max_seqlen", options["max_seqlen"])
        tables = rotary._update_cos_sin_cache(seqlen, qkv.device, qkv.dtype)
        tables = tables[: 2 if rotary.scale_base is None else 4]
        own = [table[positions] for table in tables]
        count, end = self._heads.num_heads, self._heads.num_heads + self._heads.num_heads_kv
        rows = qkv if cu_seqlens is None else qkv[None]
        where = {"interleaved": rotary.interleaved, "inplace": True}
        apply_rotary_emb(rows[:, :, :count], *own[:2], **where)
        apply_rotary_emb(rows[:, :, count:end], *own[-2:], **where)
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
        if packing_of(inference_params) is not None:
            return self._attend_packed(q, kv, inference_params)
        if self.rotary_emb_dim == 0:
            return self._update_kvcache_attention(q, kv, inference_params)
        rotary = self.rotary_emb
        # The tables of one length throughout: those of xPos are not the same for another one.
        cache = cache_rows(kv, inference_params, self.layer_idx)
        capacity = cache_capacity(cache, inference_params)
        if self._kernel_rotates(q.shape[1]):
            cos, sin, *_ = rotary._update_cos_sin_cache(capacity, q.device, q.dtype)
            return self._attend_cache(
                q,
                kv,
                inference_params,
                cache,
                rotary_cos=cos,
                rotary_sin=sin,
                rotary_interleaved=rotary.interleaved,
            )
        length = cached_lengths(q.shape[0], inference_params)
        if not rotary.depends_on_length:
            q, kv = rotary(q, kv, seqlen_offset=length, max_seqlen=capacity)
        elif isinstance(length, Tensor):  # sequences of different lengths: each has its own angles
            for i, start in enumerate(length.tolist()):
                rotary(q[i : i + 1], kv[i : i + 1], seqlen_offset=start)
        else:
            q, kv = rotary(q, kv, seqlen_offset=length)
        return self._update_kvcache_attention(q, kv, inference_params)

    def _kernel_rotates(self, seqlen: int) -> bool:
        """Whether flash_attn_with_kvcache turns queries and keys as the module does.

        Without any mask it takes all queries to be at one position.
        """
        rotary = self.rotary_emb
        if not self.use_flash_attn or rotary.scale_base is not None or rotary.depends_on_length:
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
            return self._run(self.inner_cross_attn, q, whole)
        place = torch.arange(whole.shape[1], device=q.device)
        is_token = place < (length + kv.shape[1])[:, None]
        return self._run(self.inner_cross_attn, q, whole, key_padding_mask=is_token)

    def _score_options(self) -> dict:
        """How scores become weights, for attention over a cache."""
        inner = self.inner_cross_attn
        return {
            "softmax_scale": inner.softmax_scale,
            "causal": inner.causal,
            "window_size": inner.window_size,
            "softcap": inner.softcap,
            "alibi_slopes": inner.alibi_slopes,
            "s_aux": None if self.sinks is None else self.sinks.detach(),
        }

    def _attend_cache(
        self, q: Tensor, kv: Tensor, inference_params, cache: Optional[Tensor] = None, **rotary
    ) -> Tensor:
        if cache is None:
            cache = cache_rows(kv, inference_params, self.layer_idx)
        length = cached_lengths(q.shape[0], inference_params)
        check_room(length, kv.shape[1], cache)
        return flash_attn_with_kvcache(
            q,
            *cache.unbind(2),
            *kv.unbind(2),
            cache_seqlens=length,
            block_table=block_table_of(inference_params),
            **self._score_options(),
            **rotary,
        )

    def _attend_packed(self, q: Tensor, kv: Tensor, inference_params) -> Tensor:
        """Turn packed q and kv, append kv to the cache, and attend over it.

        Args:
            q: ``(1, total, nheads, headdim)``, possibly overwritten.
            kv: ``(1, total, 2, nheads_k, headdim)``, likewise.

        Returns:
            Of q's shape.
        """
        packing = packing_of(inference_params)
        if q.shape[:2] != (1, packing.total):
            raise ValueError(
                f"inference_params.packing needs tokens (1, {packing.total}), got "
                f"{tuple(q.shape[:2])}"
            )
        q, kv = q[0], kv[0]
        if self.rotary_emb_dim > 0:
            capacity = whole_cache(kv, inference_params, self.layer_idx).shape[1]
            rotate_packed(self.rotary_emb, q, kv, packing, capacity)
        pages, table = append_packed(kv, inference_params, self.layer_idx)
        out = flash_attn_varlen_func(
            q,
            *pages.unbind(2),
            packing.cu_seqlens_q,
            packing.cu_seqlens_k,
            packing.max_seqlen_q,
            packing.max_seqlen_k,
            block_table=table,
            **self._score_options(),
        )
        return out[None]
