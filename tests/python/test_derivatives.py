"""Derivatives of every kind, against the same derivative of the fp64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from reference import attention
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from flash_attn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
)

SEQLENS_Q, SEQLENS_K = (4, 0, 6), (5, 3, 7)
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window_softcap": {"window_size": (2, 1), "softcap": 2.0},
    "everything": {"causal": True, "softcap": 3.0, "alibi_slopes": "b", "softmax_scale": 0.7},
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_out(q, k, v, **options):
    return attention(q, k, v, **options)[0]


class Dense:
    """q, k, v, s_aux, attn_bias of a dense batch; out and softmax_lse by library or reference."""

    def __init__(self, features, dtype=torch.float32):
        self.options = dict(FEATURES[features])
        if "alibi_slopes" in self.options:
            self.options["alibi_slopes"] = randn(2, 4, seed=9).abs()
        shapes = (2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 5), (4,), (1, 4, 5, 7)
        self.inputs = tuple(randn(*s, seed=i).to(dtype) for i, s in enumerate(shapes))
        self.tangents = tuple(randn(*s, seed=10 + i).to(dtype) for i, s in enumerate(shapes))

    def run(self, q, k, v, s_aux, attn_bias):
        out, lse, _ = flash_attn_func(
            q, k, v, s_aux=s_aux, attn_bias=attn_bias, **self.options, return_attn_probs=True
        )
        return out, lse

    def exact(self, q, k, v, s_aux, attn_bias):
        return attention(q, k, v, s_aux=s_aux, attn_bias=attn_bias, **self.options)


class Packed(Dense):
    """The same of a packed batch with an empty sequence."""

    def __init__(self, features, dtype=torch.float32):
        super().__init__(features, dtype)
        if "alibi_slopes" in self.options:
            self.options["alibi_slopes"] = randn(3, 4, seed=9).abs()
        shapes = (10, 4, 6), (15, 2, 6), (15, 2, 5), (4,), (3, 1, 6, 7)
        self.inputs = tuple(randn(*s, seed=i).to(dtype) for i, s in enumerate(shapes))
        self.tangents = tuple(randn(*s, seed=10 + i).to(dtype) for i, s in enumerate(shapes))

    def run(self, q, k, v, s_aux, attn_bias):
        cu_q, cu_k = int32(0, 4, 4, 10), int32(0, 5, 8, 15)
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 6, 7,
            s_aux=s_aux, attn_bias=attn_bias, **self.options, return_attn_probs=True,
        )  # fmt: skip
        return out, lse

    def exact(self, q, k, v, s_aux, attn_bias):
        outs, lses = [], []
        parts = zip(q.split(SEQLENS_Q), k.split(SEQLENS_K), v.split(SEQLENS_K))
        for i, (q_i, k_i, v_i) in enumerate(parts):
            options = dict(self.options)
            if "alibi_slopes" in options:
                options["alibi_slopes"] = options["alibi_slopes"][i]
            bias = attn_bias[i : i + 1, :, : len(q_i), : len(k_i)]
            out, lse = attention(
                q_i[None], k_i[None], v_i[None], s_aux=s_aux, attn_bias=bias, **options
            )
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1)


def double(tensors):
    return tuple(t.double() for t in tensors)


def assert_same(actual, exact, tolerance=2e-5):
    if isinstance(exact, torch.Tensor):
        exact = exact.detach()
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        torch.testing.assert_close(
            actual.detach().double(), exact, rtol=0, atol=tolerance * scale, equal_nan=False
        )
        return
    assert len(actual) == len(exact)
    for a, e in zip(actual, exact):
        assert_same(a, e, tolerance)


cases = pytest.mark.parametrize("features", FEATURES)
kinds = pytest.mark.parametrize("kind", [Dense, Packed])


def loss(f):
    """A number that depends on out and softmax_lse, not linearly."""

    def g(*inputs):
        out, lse = f(*inputs)
        return (out.float() if out.dtype != torch.float64 else out).square().sum() + lse.sin().sum()

    return g


@kinds
@cases
def test_jvp(kind, features):
    case = kind(features)
    _, actual = jvp(case.run, case.inputs, case.tangents)
    _, exact = jvp(case.exact, double(case.inputs), double(case.tangents))
    assert_same(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_jvp_in_16_bits(dtype):
    case = Dense("everything", dtype)
    (_, _), (dout, dlse) = jvp(case.run, case.inputs, case.tangents)
    _, exact = jvp(case.exact, double(case.inputs), double(case.tangents))
    assert dout.dtype == dtype
    assert_same((dout, dlse), exact, 2 * torch.finfo(dtype).eps)


@kinds
def test_jvp_of_one_input(kind):
    """The tangents of the others are 0."""
    case = kind("causal")
    q, *others = case.inputs
    _, actual = jvp(lambda q: case.run(q, *others), (q,), case.tangents[:1])
    _, exact = jvp(
        lambda q: case.exact(q, *double(others)), double((q,)), double(case.tangents[:1])
    )
    assert_same(actual, exact)


@kinds
@cases
def test_dual_numbers(kind, features):
    case = kind(features)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(case.inputs, case.tangents)]
        actual = [forward_ad.unpack_dual(y).tangent for y in case.run(*duals)]
    _, exact = jvp(case.exact, double(case.inputs), double(case.tangents))
    assert_same(actual, exact)


@kinds
@cases
def test_vjp_and_grad(kind, features):
    case = kind(features)
    every = tuple(range(5))
    assert_same(
        grad(loss(case.run), every)(*case.inputs),
        grad(loss(case.exact), every)(*double(case.inputs)),
    )
    outputs, pull_back = vjp(case.run, *case.inputs)
    cotangents = tuple(randn(*y.shape, seed=20) for y in outputs)
    _, exact_pull_back = vjp(case.exact, *double(case.inputs))
    assert_same(pull_back(cotangents), exact_pull_back(double(cotangents)))


@kinds
@pytest.mark.parametrize("transform", [jacfwd, jacrev])
def test_jacobians(kind, transform):
    case = kind("everything")
    assert_same(
        transform(case.run, (0, 1, 2))(*case.inputs),
        transform(case.exact, (0, 1, 2))(*double(case.inputs)),
    )


@kinds
@pytest.mark.parametrize("features", ["causal", "everything"])
@pytest.mark.parametrize(
    "transform",
    [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacfwd(f)),
    ],
    ids=["hessian", "jacrev-jacrev", "jacrev-jacfwd", "jacfwd-jacfwd"],
)
def test_second_derivatives_by_transforms(kind, features, transform):
    case = kind(features)
    weights = randn(6, 2, seed=30)

    def of_two_numbers(f, inputs):
        return lambda x: loss(f)(*(y * x[i % 2] for i, y in enumerate(inputs)))

    del weights
    at = torch.tensor([0.9, 1.1])
    actual = transform(of_two_numbers(case.run, case.inputs))(at)
    exact = transform(of_two_numbers(case.exact, double(case.inputs)))(at.double())
    assert_same(actual, exact, 1e-4)


@kinds
@cases
def test_double_backward(kind, features):
    """Of all inputs and of what flows into out and softmax_lse."""
    case = kind(features)

    def second(f, inputs, seed=40):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = f(*leaves)
        dtype = outputs[1].dtype
        cotangents = [randn(*y.shape, seed=seed).to(dtype).requires_grad_() for y in outputs]
        first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
        total = sum((g * randn(*g.shape, seed=50 + i).to(dtype)).sum() for i, g in enumerate(first))
        return torch.autograd.grad(total, [*leaves, *cotangents])

    assert_same(second(case.run, case.inputs), second(case.exact, double(case.inputs)), 1e-4)


@kinds
@cases
@pytest.mark.parametrize("create_graph", [False, True])
def test_tangents_of_gradients(kind, features, create_graph):
    """The gradient of dual numbers is a dual number, whether or not it is recorded."""
    case = kind(features)
    with forward_ad.dual_level():
        leaves = [x.requires_grad_() for x in case.inputs]
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, case.tangents)]
        gradients = torch.autograd.grad(loss(case.run)(*duals), duals, create_graph=create_graph)
        actual = [forward_ad.unpack_dual(g).tangent for g in gradients]
    every = tuple(range(5))
    _, exact = jvp(
        grad(loss(case.exact), every),
        tuple(x.detach() for x in double(case.inputs)),
        double(case.tangents),
    )
    assert_same(actual, exact, 1e-4)


def test_autocast_leaves_derivatives_exact():
    case = Dense("everything")
    every = tuple(range(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, actual = jvp(case.run, case.inputs, case.tangents)
        _, second = jvp(grad(loss(case.run), every), case.inputs, case.tangents)
    exact = double(case.inputs), double(case.tangents)
    assert_same(actual, jvp(case.exact, *exact)[1])
    assert_same(second, jvp(grad(loss(case.exact), every), *exact)[1], 1e-4)


def test_second_derivative_off_the_path():
    """The weights are seen by the gradient alone."""

    def second(f, x, w, k, v):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x @ w, k, v).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)

    tensors = randn(1, 5, 2, 8), randn(8, 8, seed=1), randn(1, 7, 2, 8, seed=2), randn(1, 7, 2, 8)
    exact = second(lambda *x: attention(*x)[0], *double(tensors))
    assert exact[0].abs().max() > 0.1
    assert_same(second(flash_attn_func, *tensors), exact, 1e-4)


def test_functional_hessian():
    q, k, v = randn(1, 2, 1, 3), randn(1, 4, 1, 3, seed=1), randn(1, 4, 1, 3, seed=2)
    actual = torch.autograd.functional.hessian(lambda q: flash_attn_func(q, k, v).sum(), q)
    exact = torch.autograd.functional.hessian(
        lambda q: attention(q, k.double(), v.double())[0].sum(), q.double()
    )
    assert_same(actual, exact, 1e-4)


def test_third_derivative():
    q, k, v = randn(1, 2, 1, 3), randn(1, 4, 1, 3, seed=1), randn(1, 4, 1, 3, seed=2)

    def third(f, q):
        x = torch.ones((), dtype=q.dtype, requires_grad=True)
        y = f(x * q).sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
        return y

    exact = third(lambda q: attention(q, k.double(), v.double())[0], q.double())
    assert_same(third(lambda q: flash_attn_func(q, k, v), q), exact, 1e-4)


@kinds
def test_gradient_of_alibi_slopes(kind):
    case = kind("everything")
    slopes = case.options["alibi_slopes"]

    def gradient(f, inputs, slopes):
        slopes = slopes.detach().requires_grad_()
        case.options["alibi_slopes"] = slopes
        return torch.autograd.grad(loss(f)(*inputs), slopes)

    actual = gradient(case.run, case.inputs, slopes)
    # The reference takes slopes in fp64.
    assert_same(actual, gradient(case.exact, double(case.inputs), slopes.double()))


def test_alibi_slopes_alone_require_a_gradient():
    """Nothing else does, and no argument asks for the operator."""
    q, k, v = randn(1, 5, 2, 8), randn(1, 7, 2, 8, seed=1), randn(1, 7, 2, 8, seed=2)
    slopes = torch.tensor([0.5, 0.25])
    cu_q, cu_k = int32(0, 5), int32(0, 7)

    def dense(slopes):
        return flash_attn_func(q, k, v, alibi_slopes=slopes)

    def packed(slopes):
        return flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 5, 7, alibi_slopes=slopes)

    def exact(slopes):
        return attention(*double((q, k, v)), alibi_slopes=slopes)[0]

    def gradient(f, slopes):
        slopes = slopes.requires_grad_()
        return torch.autograd.grad(f(slopes).square().sum(), slopes)

    wanted = gradient(exact, slopes.double())
    for f in (dense, packed):
        assert_same(gradient(f, slopes.clone()), wanted)


def test_first_gradients_with_create_graph_are_the_kernel_s():
    case = Dense("everything")
    leaves = [x.requires_grad_() for x in case.inputs]
    plain = torch.autograd.grad(loss(case.run)(*leaves), leaves)
    graph = torch.autograd.grad(loss(case.run)(*leaves), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph))


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_keeps_its_mask(packed):
    """Derivatives are those of the function that dropped what the forward dropped."""
    q, k, v, t = (randn(2, 40, 2, 8, seed=i) for i in range(4))
    cu = int32(0, 40, 80)

    def f(q):
        torch.manual_seed(3)
        if not packed:
            return flash_attn_func(q, k, v, dropout_p=0.4, causal=True)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*flat, cu, cu, 40, 40, dropout_p=0.4, causal=True)

    step = 1e-2
    difference = (f(q + step * t) - f(q - step * t)) / (2 * step)
    torch.testing.assert_close(jvp(f, (q,), (t,))[1], difference, rtol=0, atol=1e-3)

    def slope(q):  # of f along t, by reverse mode
        x = q.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return (g * t).sum(), x

    value, x = slope(q)
    (second,) = torch.autograd.grad(value, x)
    numeric = (slope(q + step * t)[0] - slope(q - step * t)[0]) / (2 * step)
    torch.testing.assert_close((second * t).sum(), numeric.detach(), rtol=2e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------
# NaN and inf where a row does not look


def first_rows(f, q, k, v):
    """All rows but the last, which sees the last three keys, and alone the last of them."""
    return f(q, k, v, causal=True, window_size=(2, 0))[:, :-1]


def first_packed_rows(f, q, k, v):
    if f is not flash_attn_func:
        return first_rows(f, q, k, v)
    out = flash_attn_varlen_func(
        *(x[0] for x in (q, k, v)), int32(0, 4), int32(0, 6), 4, 6, window_size=(2, 0)
    )
    return out[None, :-1]


@pytest.mark.parametrize("rows", [first_rows, first_packed_rows])
@pytest.mark.parametrize("hole", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_row_cannot_see_does_not_reach_it(rows, hole, value):
    """Derivatives are those with 0 in place of NaN or inf; the tangents touch it, too."""
    inputs = [randn(1, 4, 4, 3), randn(1, 6, 2, 3, seed=1), randn(1, 6, 2, 3, seed=2)]
    tangents = tuple(randn(*x.shape, seed=10 + i) for i, x in enumerate(inputs))
    clean = [x.clone() for x in inputs]
    place = "qkv".index(hole)
    inputs[place][0, -1], clean[place][0, -1] = value, 0.0
    clean = double(clean)

    def second(f, x):
        (g,) = torch.autograd.grad(rows(f, *x).sin().sum(), x[0], create_graph=True)
        return torch.autograd.grad(g[:, :-1].square().sum(), x)

    leaves, exact_leaves = ([x.clone().requires_grad_() for x in y] for y in (inputs, clean))
    actual, exact = second(flash_attn_func, leaves), second(attention_out, exact_leaves)
    assert_same([x[:, :3] for x in actual], [x[:, :3] for x in exact], 1e-4)
    pushed = jvp(partial(rows, flash_attn_func), tuple(inputs), tangents)[1]
    assert_same(pushed, jvp(partial(rows, attention_out), clean, double(tangents))[1])


def test_what_a_row_sees_does_reach_it():
    q, k, v = randn(1, 2, 1, 3), randn(1, 3, 1, 3, seed=1), randn(1, 3, 1, 3, seed=2)
    v[0, 1] = float("nan")
    pushed = jvp(lambda q: flash_attn_func(q, k, v, causal=True), (q,), (q,))[1]
    assert pushed.isnan().all()
    pushed = jvp(lambda q: flash_attn_func(q, k, v, window_size=(0, 0)), (q,), (q,))[1]
    assert pushed[0, 0].isnan().all() and pushed[0, 1].isfinite().all()


# ------------------------------------------------------------------------------------------------
# vmap


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 0, None), (None, 2, 2)])
def test_vmap(in_dims):
    q, k, v = randn(3, 2, 5, 4, 6), randn(3, 2, 7, 2, 6, seed=1), randn(3, 2, 7, 2, 6, seed=2)
    args = [x[0] if d is None else x.movedim(0, d) for x, d in zip((q, k, v), in_dims)]
    actual = vmap(flash_attn_func, in_dims)(*args)
    chosen = [x[:1].expand_as(x) if d is None else x for x, d in zip((q, k, v), in_dims)]
    expected = torch.stack([flash_attn_func(*x) for x in zip(*chosen)])
    assert torch.equal(actual, expected)


def test_vmap_of_strided_slopes():
    """The mapped dimension is the last, so each element's is not contiguous."""
    q, k, v = (x[0] for x in (randn(1, 2, 5, 4, 6), randn(1, 2, 7, 2, 6), randn(1, 2, 7, 2, 6)))
    slopes = randn(4, 3).abs()
    actual = vmap(lambda s: flash_attn_func(q, k, v, alibi_slopes=s), -1)(slopes)
    expected = [flash_attn_func(q, k, v, alibi_slopes=s) for s in slopes.t().contiguous()]
    assert torch.equal(actual, torch.stack(expected))


@kinds
def test_vmap_of_gradients(kind):
    """As per-sample gradients are taken."""
    case = kind("everything")
    batch = [torch.stack([x, 2 * x, -x]) for x in case.inputs]
    actual = vmap(grad(loss(case.run), (0, 1, 2, 3, 4)))(*batch)
    each = [grad(loss(case.exact), (0, 1, 2, 3, 4))(*double(x)) for x in zip(*batch)]
    assert_same(actual, tuple(map(torch.stack, zip(*each))))


@kinds
def test_vmap_over_nothing(kind):
    """The results have the shapes of a batch without elements."""
    case = kind("everything")
    empty = [x.new_zeros(0, *x.shape) for x in case.inputs]
    for result, one in zip(vmap(case.run)(*empty), case.run(*case.inputs)):
        assert result.shape == (0, *one.shape)
        assert result.dtype == one.dtype
    gradients = vmap(grad(loss(case.run), (0, 1, 2)))(*empty)
    assert [g.shape for g in gradients] == [x.shape for x in empty[:3]]
    last = [x.movedim(0, -1) for x in empty]
    assert vmap(case.run, -1)(*last)[0].shape == (0, *case.run(*case.inputs)[0].shape)


def test_softcap_of_which_the_reciprocal_is_infinite():
    """All scores are 0 then: weights are equal and do not depend on q."""
    q, k, v = randn(1, 3, 2, 4), randn(1, 4, 2, 4, seed=1), randn(1, 4, 2, 4, seed=2)

    def f(q, v):
        return flash_attn_func(q, k, v, softcap=1e-42)

    pushed = jvp(f, (q, v), (100 * q, v))[1]
    assert_same(pushed, v.double().mean(1, keepdim=True).expand(1, 3, 2, 4))
    assert_same(
        grad(lambda q: (grad(lambda q: f(q, v).sin().sum())(q) ** 2).sum())(q), 0 * q.double()
    )


def test_vmap_with_dropout_says_what_it_needs():
    x = randn(3, 1, 5, 2, 8)
    with pytest.raises(RuntimeError, match="randomness='different'"):
        vmap(lambda x: flash_attn_func(x, x, x, dropout_p=0.5))(x)
    out = vmap(lambda x: flash_attn_func(x, x, x, dropout_p=0.5), randomness="different")(x)
    assert out.shape == x.shape


def test_module_per_sample_gradients():
    """torch.func.functional_call of a module that attends."""
    layer = torch.nn.Linear(8, 24)

    def f(parameters, x):
        qkv = functional_call(layer, parameters, x).unflatten(-1, (3, 2, 4))
        return flash_attn_qkvpacked_func(qkv[None], causal=True).square().sum()

    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    x = randn(3, 6, 8)
    together = vmap(grad(f), (None, 0))(parameters, x)
    for i in range(3):
        alone = grad(f)(parameters, x[i])
        for name, g in alone.items():
            torch.testing.assert_close(together[name][i], g)


# ------------------------------------------------------------------------------------------------
# What has no derivative says so


def cache_call(q, cache, **more):
    return flash_attn_with_kvcache(q, cache, cache, **more)


def test_cache_has_no_derivative():
    q, cache = randn(1, 1, 2, 8), randn(1, 9, 2, 8)
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(lambda q: cache_call(q, cache), (q,), (q,))
    with pytest.raises(RuntimeError, match="no derivative"):
        grad(lambda q: cache_call(q, cache).sum())(q)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative"):
        cache_call(forward_ad.make_dual(q, q), cache)
    with forward_ad.dual_level():
        assert torch.equal(cache_call(q, cache), flash_attn_func(q, cache, cache))


@pytest.mark.parametrize(
    "name",
    ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "alibi_slopes", "s_aux"],
)
def test_cache_has_no_derivative_in_any_argument(name):
    cache, new = randn(1, 9, 2, 8), randn(1, 1, 2, 8)
    tensors = {"q": new.clone(), "k_cache": cache.clone(), "v_cache": cache.clone()}
    tensors.update(k=new.clone(), v=new.clone(), alibi_slopes=randn(2), s_aux=randn(2))
    tensors.update(rotary_cos=randn(9, 4), rotary_sin=randn(9, 4))

    def call(x):
        given = {n: t.clone() for n, t in tensors.items()}
        return flash_attn_with_kvcache(**{**given, name: x}, cache_seqlens=2)

    x = tensors[name]
    with pytest.raises(RuntimeError, match="no derivative"):
        grad(lambda x: call(x).sum())(x)
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative"):
        call(forward_ad.make_dual(x, x))


def backward_arguments(packed):
    """Arguments of _flash_attn_backward or _flash_attn_varlen_backward by name."""
    q, k, v = (randn(1, 5, 2, 8, seed=i) for i in range(3))
    slopes, sinks, bias = randn(2).abs(), randn(2, seed=1), randn(1, 2, 5, 5)
    numbers = {"dropout_p": 0.0, "softmax_scale": 0.3, "causal": False, "softcap": 0.0}
    numbers.update(window_size_left=-1, window_size_right=-1)
    more = {"s_aux": sinks, "attn_bias": bias}
    out, lse, *_ = _flash_attn_forward(q, k, v, *FORWARD_NUMBERS, slopes, False, **more)
    tensors = {"dout": out.clone(), "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    tensors.update(dq=q.clone(), dk=k.clone(), dv=v.clone(), dlse=lse.clone())
    if packed:
        tensors = {n: x[0] for n, x in tensors.items()}
        numbers.update(max_seqlen_q=5, max_seqlen_k=5)
        numbers.update(cu_seqlens_q=int32(0, 5), cu_seqlens_k=int32(0, 5))
    tensors.update(alibi_slopes=slopes, ds_aux=sinks.clone(), dattn_bias=bias.clone(), **more)
    return {**tensors, **numbers, "deterministic": True}


FORWARD_NUMBERS = (0.0, 0.3, False, -1, -1, 0.0)
READ = ["dout", "q", "k", "v", "out", "softmax_lse", "dlse", "alibi_slopes", "s_aux", "attn_bias"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", READ)
def test_backward_functions_refuse_tangents_of_any_argument(packed, name):
    f = _flash_attn_varlen_backward if packed else _flash_attn_backward
    arguments = backward_arguments(packed)
    x = arguments.pop(name)
    with forward_ad.dual_level():
        f(**arguments, **{name: x})
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            f(**arguments, **{name: forward_ad.make_dual(x, x)})


def test_backward_functions_refuse_tangents():
    """They write their results in place, where torch would drop the tangents."""
    q, k, v = (randn(1, 5, 2, 8, seed=i) for i in range(3))
    score = (0.0, 0.3, False, -1, -1, 0.0, None)
    out, lse, _, rng_state = _flash_attn_forward(q, k, v, *score, False)

    def dense(q):
        dq = torch.empty_like(q)
        _flash_attn_backward(out, q, k, v, out, lse, dq, None, None, *score, False, rng_state)
        return dq

    def packed(q):
        dq, cu = torch.empty_like(q[0]), int32(0, 5)
        _flash_attn_varlen_backward(
            *(out[0], q[0], k[0], v[0], out[0], lse[0], dq, None, None, cu, cu, 5, 5),
            *(*score, False, rng_state),
        )
        return dq

    for f in (dense, packed):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            jvp(f, (q,), (q,))
        with forward_ad.dual_level():
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                f(forward_ad.make_dual(q, q))
            f(q)


def test_pages_have_no_derivative():
    q, pages = randn(4, 2, 8), randn(3, 16, 2, 8)
    cu, table = int32(0, 4), int32(0, 1).view(1, 2)

    def f(q):
        return flash_attn_varlen_func(q, pages, pages, cu, int32(0, 20), 4, 20, block_table=table)

    with pytest.raises(RuntimeError, match="block_table"):
        jvp(f, (q,), (q,))
    with pytest.raises(RuntimeError, match="block_table"):
        grad(lambda q: f(q).sum())(q)
