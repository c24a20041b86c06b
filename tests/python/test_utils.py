"""flash_attn.utils: the reference for users' tests, and the timing helpers."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F

from flash_attn.utils import benchmark
from flash_attn.utils.testing import (
    attention_ref,
    construct_chunk_mask,
    construct_local_mask,
    generate_qkv,
    generate_random_padding_mask,
)


def random_qkv(b=2, sq=5, sk=7, h=4, hk=2, d=8, dv=8, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv))
    return [torch.randn(s, generator=gen).to(dtype) for s in shapes]


def sdpa(q, k, v, **options):
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True, **options
    )
    return out.transpose(1, 2)


class TestReference:
    """tests/python/reference.py, which the library is measured against, against PyTorch."""

    @pytest.mark.parametrize("sizes", [(5, 7), (7, 7), (7, 5), (1, 1)])
    def test_plain(self, sizes):
        q, k, v = random_qkv(sq=sizes[0], sk=sizes[1], dv=6, dtype=torch.float64)
        out, lse = reference.attention(q, k, v)
        torch.testing.assert_close(out, sdpa(q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
        torch.testing.assert_close(lse, scores.logsumexp(-1))

    def test_bias_scale_and_square_causal(self):
        q, k, v = random_qkv(sq=7, dtype=torch.float64)
        bias = torch.randn(2, 1, 7, 7, dtype=torch.float64)
        hidden = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
        out, _ = reference.attention(q, k, v, attn_bias=bias, softmax_scale=0.3, causal=True)
        torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=bias + hidden, scale=0.3))

    @pytest.mark.parametrize("sq,sk", [(4, 6), (6, 4), (5, 5), (1, 3)])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("window", [(-1, -1), (2, -1), (-1, 1), (1, 2), (0, 0)])
    def test_visible(self, sq, sk, causal, window):
        left, right = window
        mask = reference.visible(sq, sk, causal, window)
        for i in range(sq):
            for j in range(sk):
                first = 0 if left < 0 else i + sk - sq - left
                last = sk if right < 0 else i + sk - sq + right
                last = min(last, i + sk - sq) if causal else last
                assert bool(mask[i, j]) == (first <= j <= last), (i, j)

    def test_alibi_bias(self):
        bias = reference.alibi_bias(torch.tensor([[0.5, 2.0]]), 2, 3)
        assert bias[0, 0].tolist() == [[-0.5, 0, -0.5], [-1, -0.5, 0]]
        assert bias[0, 1].tolist() == [[-2, 0, -2], [-4, -2, 0]]

    def test_sink_is_a_key_without_a_value(self):
        q, k, v = random_qkv(b=1, h=1, hk=1, dtype=torch.float64)
        extra = torch.full((1, 1, 5, 8), 0.0, dtype=torch.float64)
        extra[..., 0] = 0.7
        out, lse = reference.attention(q, k, v, s_aux=torch.tensor([0.7]))
        scores = torch.cat([torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5, extra[..., :1]], -1)
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-7)
        probs = scores.softmax(-1)[..., :-1]
        torch.testing.assert_close(out[0, :, 0], (probs @ v[:, :, 0])[0, 0], rtol=0, atol=1e-7)

    def test_softcap_and_dropout(self):
        q, k, v = random_qkv(h=2, hk=2, dtype=torch.float64)
        keep = torch.rand(2, 2, 5, 7) < 0.6
        out, _ = reference.attention(q, k, v, softcap=0.5, keep=keep, dropout_p=0.4)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
        probs = (0.5 * (2 * scores).tanh()).softmax(-1) * keep / 0.6
        torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", probs, v))

    @pytest.mark.parametrize("sinks", [False, True])
    def test_rows_without_keys(self, sinks):
        q, k, v = random_qkv(sq=5, sk=3, dtype=torch.float64)
        tensors = {"q": q, "k": k, "v": v}
        if sinks:
            tensors["s_aux"] = torch.arange(4.0)
        dout, dlse = torch.ones_like(q), torch.ones(2, 4, 5)
        result = reference.attention_and_gradients(tensors, {"causal": True}, dout, dlse)
        lse = torch.arange(4.0) if sinks else torch.full((4,), torch.inf)
        assert (result["out"][:, :2] == 0).all()
        assert (result["lse"][..., :2] == lse[:, None]).all()
        assert (result["dq"][:, :2] == 0).all()
        assert all(torch.isfinite(result[f"d{n}"]).all() for n in tensors)

    def test_gradients(self):
        q, k, v = random_qkv(sq=3, sk=4, h=2, hk=1, d=3, dv=2, dtype=torch.float64)
        sinks = torch.randn(2, dtype=torch.float64)
        bias = torch.randn(2, 3, 4, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (q, k, v, sinks, bias)]

        def run(q, k, v, s_aux, attn_bias):
            return reference.attention(q, k, v, s_aux=s_aux, attn_bias=attn_bias, softcap=2.0)

        assert torch.autograd.gradcheck(run, leaves)


class TestAssertAttentionClose:
    exact = torch.linspace(-2, 2, 2048, dtype=torch.float64)
    exact[3] = torch.inf

    def shifted(self, by, dtype=torch.float32, size=2048):
        x = self.exact[:size].clone()
        x[1] += by
        return x.to(dtype)

    def test_accepts_twice_the_plain_error(self):
        close = reference.assert_attention_close
        close(self.shifted(1.9e-2), self.exact, self.shifted(-1e-2), "x")
        close(self.shifted(3e-3, torch.bfloat16), self.exact, self.shifted(0.0), "x")

    def test_accepts_four_times_the_plain_error_of_small_tensors(self):
        small = [self.shifted(by, size=100) for by in (3.9e-2, 4.1e-2, -1e-2)]
        reference.assert_attention_close(small[0], self.exact[:100], small[2], "x")
        with pytest.raises(AssertionError, match="largest error"):
            reference.assert_attention_close(small[1], self.exact[:100], small[2], "x")

    @pytest.mark.parametrize("dtype,error", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
    def test_rejects_more(self, dtype, error):
        with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
            reference.assert_attention_close(
                self.shifted(error, dtype), self.exact, self.shifted(0.0), "x"
            )

    @pytest.mark.parametrize("value,kind", [(torch.nan, "nan"), (torch.inf, "inf"), (0.0, "inf")])
    def test_rejects_other_non_finite_places(self, value, kind):
        actual = self.shifted(0.0)
        actual[3 if value == 0 else 0] = value
        with pytest.raises(AssertionError, match=kind):
            reference.assert_attention_close(actual, self.exact, self.exact, "x")


class TestAttentionRef:
    @pytest.mark.parametrize("causal,window", [(False, (None, None)), (True, (3, None))])
    def test_equals_the_other_reference(self, causal, window):
        q, k, v = random_qkv(dv=6)
        bias = torch.randn(2, 4, 5, 7)
        keep = torch.rand(2, 4, 5, 7) < 0.8
        out, _ = attention_ref(
            q,
            k,
            v,
            attn_bias=bias,
            dropout_p=0.2,
            dropout_mask=keep,
            causal=causal,
            window_size=window,
            learnable_sink=torch.arange(4.0),
            softcap=3.0,
        )
        expected, _ = reference.attention(
            q,
            k,
            v,
            attn_bias=bias,
            dropout_p=0.2,
            keep=keep,
            causal=causal,
            window_size=tuple(-1 if w is None else w for w in window),
            s_aux=torch.arange(4.0),
            softcap=3.0,
        )
        torch.testing.assert_close(out, expected)

    def test_padding_equals_slicing(self):
        q, k, v = random_qkv()
        q_mask = torch.arange(5) < torch.tensor([[3], [5]])
        k_mask = torch.arange(7) < torch.tensor([[7], [4]])
        out, probs = attention_ref(q, k, v, q_mask, k_mask, causal=True)
        for b, (sq, sk) in enumerate([(3, 7), (5, 4)]):
            args = (x[b : b + 1, :n] for x, n in ((q, sq), (k, sk), (v, sk)))
            expected, _ = reference.attention(*args, causal=True)
            torch.testing.assert_close(out[b, :sq], expected[0])
            assert (out[b, sq:] == 0).all()
        assert (probs[0, :, 3:] == 0).all()
        assert (probs[1, ..., 4:] == 0).all()

    def test_leftpad_equals_slicing(self):
        q, k, v = random_qkv(b=1)
        k_mask = torch.arange(7)[None] >= 2
        out, _ = attention_ref(
            q, k, v, None, k_mask, key_leftpad=torch.tensor([2]), window_size=(1, 1)
        )
        expected, _ = reference.attention(q, k[:, 2:], v[:, 2:], window_size=(1, 1))
        torch.testing.assert_close(out, expected)

    def test_qv_is_more_of_the_head_dim(self):
        q, k, v = random_qkv(dv=6)
        qv = torch.randn(2, 5, 4, 6)
        out, _ = attention_ref(q, k, v, qv=qv)
        expected, _ = reference.attention(torch.cat([q, qv], -1), torch.cat([k, v], -1), v)
        torch.testing.assert_close(out, expected)

    def test_descale(self):
        q, k, v = random_qkv()
        factors = [torch.rand(2, 2) for _ in range(3)]
        out, _ = attention_ref(
            q, k, v, q_descale=factors[0], k_descale=factors[1], v_descale=factors[2]
        )
        scaled_q = q * factors[0].repeat_interleave(2, 1)[:, None, :, None]
        expected, _ = reference.attention(
            scaled_q, k * factors[1][:, None, :, None], v * factors[2][:, None, :, None]
        )
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_precision_options(self, dtype):
        q, k, v = random_qkv(dtype=dtype)
        exact, _ = reference.attention(q.double(), k.double(), v.double())

        def error(**options):
            out, probs = attention_ref(q, k, v, **options)
            assert out.dtype == probs.dtype == dtype
            return (out.double() - exact).abs().max().item()

        best = error()
        assert best <= torch.finfo(dtype).eps * exact.abs().max()
        coarse = 4 * torch.finfo(dtype).eps * v.abs().max()
        for options in (
            {"upcast": False},
            {"upcast": False, "reorder_ops": True},
            {"intermediate_dtype": dtype},
        ):
            assert best <= error(**options) <= coarse, options


class TestMasks:
    @pytest.mark.parametrize("window", [(None, None), (2, None), (None, 1), (1, 2), (None, 0)])
    @pytest.mark.parametrize("sq,sk", [(4, 6), (6, 4)])
    def test_local(self, window, sq, sk):
        hidden = construct_local_mask(sq, sk, window)
        window = tuple(-1 if w is None else w for w in window)
        assert torch.equal(~hidden, reference.visible(sq, sk, window_size=window))

    def test_local_keeps_sink_tokens(self):
        hidden = construct_local_mask(6, 6, (1, 0), sink_token_length=2)
        assert hidden[5].tolist() == [False, False, True, True, False, False]
        assert hidden[0].tolist() == [False, True, True, True, True, True]

    def test_chunk(self):
        hidden = construct_chunk_mask(3, 6, 4)  # queries stand at positions 3, 4, 5
        visible = [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]
        assert (~hidden).int().tolist() == visible

    def test_chunk_in_attention_ref(self):
        q, k, v = random_qkv(sq=6, sk=6)
        out, _ = attention_ref(q, k, v, attention_chunk=4, causal=True)
        first, _ = reference.attention(q[:, :4], k[:, :4], v[:, :4], causal=True)
        second, _ = reference.attention(q[:, 4:], k[:, 4:], v[:, 4:], causal=True)
        torch.testing.assert_close(out, torch.cat([first, second], 1))


class TestGenerators:
    @pytest.mark.parametrize("mode,shortest", [("full", 40), ("random", 20), ("third", 13)])
    def test_padding_mask(self, mode, shortest):
        mask = generate_random_padding_mask(40, 64, "cpu", mode=mode)
        lengths = mask.sum(-1)
        assert mask.shape == (64, 40)
        assert torch.equal(mask, torch.arange(40) < lengths[:, None])
        assert shortest <= lengths.min()
        assert lengths.max() <= 40

    def test_padding_mask_with_empty_rows(self):
        lengths = generate_random_padding_mask(40, 12, "cpu", zero_lengths=True).sum(-1)
        assert lengths[[0, 5, 10, 11]].tolist() == [0, 0, 0, 0]
        assert generate_random_padding_mask(5, 64, "cpu").sum(-1).min() >= 1

    def test_padding_mask_rejects_unknown_modes(self):
        with pytest.raises(ValueError, match="mode"):
            generate_random_padding_mask(5, 2, "cpu", mode="other")

    @pytest.mark.parametrize("padded", [False, True])
    def test_qkv(self, padded):
        q, k, v = random_qkv(dv=6)
        qv = torch.randn(2, 5, 4, 6)
        q_mask = torch.arange(5) < torch.tensor([[3], [5]]) if padded else None
        k_mask = torch.arange(7) < torch.tensor([[7], [4]]) if padded else None
        (q_unpad, k_unpad, v_unpad, qv_unpad, cu_q, cu_k, seqused_q, seqused_k, max_q, max_k,
         *same, out_pad, dq_pad, dk_pad) = generate_qkv(q, k, v, q_mask, k_mask, qv)  # fmt: skip
        assert cu_q.tolist() == ([0, 3, 8] if padded else [0, 5, 10])
        assert cu_k.tolist() == ([0, 7, 11] if padded else [0, 7, 14])
        assert (max_q, max_k) == (5, 7)
        assert (seqused_q is None, seqused_k is None) == (not padded, not padded)
        assert all(torch.equal(x, y) for x, y in zip(same, (q, k, v, qv)))
        assert all(x.requires_grad and x.is_leaf for x in (q_unpad, k_unpad, v_unpad, qv_unpad))
        q_keep = q_mask[..., None, None] if padded else 1
        k_keep = k_mask[..., None, None] if padded else 1
        assert torch.equal(dq_pad(q_unpad), q * q_keep)
        assert torch.equal(out_pad(qv_unpad), qv * q_keep)
        assert torch.equal(dk_pad(v_unpad), v * k_keep)

    def test_unused_tokens_get_room(self):
        q, k, v = random_qkv()
        mask = torch.arange(7) < torch.tensor([[3], [5]])
        unused = torch.arange(7) == torch.tensor([[3], [6]])
        result = generate_qkv(q, k, v, None, mask, key_unused_mask=unused)
        assert result[5].tolist() == [0, 4, 10]
        assert result[7].tolist() == [3, 5]

    def test_packed(self):
        q, k, v = random_qkv(sq=7, h=2, hk=2)
        mask = torch.arange(7) < torch.tensor([[3], [5]])
        qkv_unpad, cu, longest, qkv, out_pad, dqkv_pad = generate_qkv(
            q, k, v, mask, mask, qkvpacked=True
        )
        assert torch.equal(qkv, torch.stack([q, k, v], 2))
        assert (cu.tolist(), longest) == ([0, 3, 8], 5)
        assert torch.equal(dqkv_pad(qkv_unpad), qkv * mask[..., None, None, None])
        assert torch.equal(out_pad(qkv_unpad[:, 0]), q * mask[..., None, None])
        q_unpad, kv_unpad, cu_q, cu_k, max_q, max_k, _, kv, _, dq_pad, dkv_pad = generate_qkv(
            q, k, v, mask, mask, kvpacked=True
        )
        assert (cu_q.tolist(), cu_k.tolist(), max_q, max_k) == ([0, 3, 8], [0, 3, 8], 5, 5)
        assert torch.equal(kv, torch.stack([k, v], 2))
        assert torch.equal(dq_pad(q_unpad), q * mask[..., None, None])
        assert torch.equal(dkv_pad(kv_unpad), kv * mask[..., None, None, None])

    def test_packed_rejects_different_padding(self):
        q, k, v = random_qkv(sq=7, h=2, hk=2)
        mask = torch.arange(7) < torch.tensor([[3], [5]])
        with pytest.raises(ValueError, match="padding"):
            generate_qkv(q, k, v, mask, None, qkvpacked=True)
        with pytest.raises(ValueError, match="exclude"):
            generate_qkv(q, k, v, kvpacked=True, qkvpacked=True)


class TestBenchmark:
    def test_counts_and_results(self, capsys):
        x = torch.randn(4, 3, requires_grad=True)
        calls = []

        def square(x, extra=0):
            calls.append(extra)
            return x * x, None

        timer, measurement = benchmark.benchmark_forward(square, x, repeats=3, desc="sq", extra=7)
        assert hasattr(timer, "timeit")
        assert measurement.mean > 0
        assert len(calls) >= 3
        assert set(calls) == {7}
        assert "sq - Forward pass" in capsys.readouterr().out

        results = benchmark.benchmark_all(square, x, repeats=2, verbose=False)
        assert len(results) == 3
        assert len(benchmark.benchmark_fwd_bwd(square, x, repeats=2, verbose=False)) == 2
        assert capsys.readouterr().out == ""

    def test_backward_takes_a_gradient_and_does_not_accumulate(self):
        x = torch.randn(4, 3, requires_grad=True)
        grad = torch.full((4, 3), 0.5)
        for run in (benchmark.benchmark_backward, benchmark.benchmark_combined):
            run(torch.square, x, grad=grad, repeats=3, verbose=False)
            torch.testing.assert_close(x.grad, x.detach())
            with pytest.raises(RuntimeError, match="shape"):
                run(torch.square, x, grad=grad[0], verbose=False)

    def test_autocast_follows_the_device(self):
        x = torch.randn(4, 4)
        seen = set()

        def product(x):
            seen.add((x @ x).dtype)
            return x

        benchmark.benchmark_forward(
            product, x, repeats=1, amp=True, amp_dtype=torch.bfloat16, verbose=False
        )
        assert seen == {torch.bfloat16}

    def test_profiler_writes_a_trace(self, tmp_path, capsys):
        x = torch.randn(4, 3, requires_grad=True)
        trace = tmp_path / "trace.json"
        benchmark.pytorch_profiler(
            torch.square, x, backward=True, cpu=True, trace_filename=str(trace)
        )
        assert trace.stat().st_size > 0
        assert "aten::" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
    def test_memory_needs_a_gpu(self):
        with pytest.raises(RuntimeError, match="CUDA"):
            benchmark.benchmark_memory(torch.square, torch.randn(3))
