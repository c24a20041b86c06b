"""Layer norm and RMS norm on the CPU, against torch's operations in fp64."""

from __future__ import annotations

import contextlib

import norm_cases
import pytest
import torch
import torch.nn.functional as F
from norm_cases import BF16, EPSILON, FP16, FP32, FP64, NormCase
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from flash_attn._library import bind
from flash_attn.ops import layer_norm as ln
from flash_attn.ops import rms_norm as rms
from flash_attn.ops._layer_norm import add_norm, add_norm_into
from flash_attn.ops.triton import layer_norm as triton

ops = torch.ops.flash_attn
close = torch.testing.assert_close


@pytest.mark.parametrize("case", norm_cases.cases(), ids=str)
def test_values(case, operator_isa):
    norm_cases.check(case, contextlib.nullcontext)


@pytest.mark.parametrize("n", norm_cases.SIZES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_sizes(n, dtype, operator_isa):
    features = {"residual": FP32, "dropout_p": 0.1, "colscale": True}
    norm_cases.check(NormCase(dtype, (5, n), **features), contextlib.nullcontext)


def test_sum_is_normed_as_it_is_kept(operator_isa):
    """Of one column that is 0, whatever the sum: so is the gradient of the weight."""
    norm_cases.check(NormCase(BF16, (50, 1), residual=BF16), contextlib.nullcontext)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 300])
def test_rows(rows):
    norm_cases.check(NormCase(FP32, (rows, 24), residual=FP32), contextlib.nullcontext)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,), (2, 0, 8)])
@pytest.mark.parametrize("norm", [triton.layer_norm_fn, triton.rms_norm_fn])
def test_empty(norm, shape):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (shape, shape[-1:], shape[-1:]))
    out = norm(x, weight, bias)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("mean", [1e2, 1e4, -1e6])
def test_large_means(mean, operator_isa):
    """The variance is that of what the numbers are, not of what sums of their squares leave."""
    norm_cases.check(NormCase(FP32, (4, 1000), mean=mean), contextlib.nullcontext)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite(value):
    x = torch.randn(3, 20)
    x[1, 5] = value
    out = triton.layer_norm_fn(x, torch.ones(20), None)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()


def test_threads_do_not_change_results(restore_threads):
    case = NormCase(BF16, (300, 777), dropout_p=0.1, residual=FP32, colscale=True)
    tensors = case.tensors()
    results = []

    def run(t):
        normed = add_norm(epsilon=EPSILON, **t, **case.options)
        return normed.out, normed.x

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        douts = [torch.ones(case.shape), torch.ones(case.shape)]
        results.append(norm_cases.results_and_gradients(run, tensors, douts))
    for others in results[1:]:
        assert all(torch.equal(results[0][name], others[name]) for name in others)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_strided(order):
    wide = torch.randn(6, 40, 2)
    x = wide[..., 0] if order == "columns" else wide[..., 0].contiguous()[:, 4:24]
    n = x.shape[-1]
    close(triton.layer_norm_fn(x, torch.ones(n), None), F.layer_norm(x, (n,), eps=1e-6))


# ------------------------------------------------------------------------------------------------
# Dropout


def test_mask_is_the_documented_function(operator_isa):
    torch.manual_seed(3)
    normed = add_norm(
        torch.randn(5, 77),
        None,
        None,
        EPSILON,
        x1=torch.randn(5, 77),
        dropout_p=0.4,
        wants_mask=True,
    )
    for branch, mask in enumerate((normed.dropout_mask, normed.dropout_mask1)):
        assert torch.equal(mask, norm_cases.expected_mask(5, 77, 0.4, normed.rng_state, branch))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 1.0])
def test_share_of_what_is_dropped(p):
    torch.manual_seed(0)
    mask = triton.layer_norm_fn(
        torch.ones(500, 400), None, None, dropout_p=p, return_dropout_mask=True
    )[1]
    dropped = 1 - mask.double().mean().item()
    assert abs(dropped - p) <= 4 * (p * (1 - p) / mask.numel()) ** 0.5


def test_dropped_is_zero_whatever_it_was():
    x = torch.full((4, 64), torch.inf)
    torch.manual_seed(0)
    _, residual, mask, _ = triton.layer_norm_fn(
        x, None, None, dropout_p=0.5, prenorm=True, return_dropout_mask=True
    )
    assert torch.equal(residual.isfinite(), ~mask)


def test_seeded_by_torch():
    x = torch.randn(8, 64)

    def run():
        return triton.rms_norm_fn(x, None, None, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_replays_dropout(use_reentrant):
    x, residual = (torch.randn(6, 32, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, requires_grad=True)

    def run(x, residual, weight):
        return triton.layer_norm_fn(x, weight, None, residual, dropout_p=0.5)

    def gradients(f):
        torch.manual_seed(2)
        return torch.autograd.grad(f().square().sum(), (x, residual, weight))

    plain = gradients(lambda: run(x, residual, weight))
    if use_reentrant:
        torch.manual_seed(2)
        checkpoint(run, x, residual, weight, use_reentrant=True).square().sum().backward()
        replayed = x.grad, residual.grad, weight.grad
    else:
        replayed = gradients(lambda: checkpoint(run, x, residual, weight, use_reentrant=False))
    assert all(map(torch.equal, plain, replayed))


# ------------------------------------------------------------------------------------------------
# Subsets of rows


def subset_case(dtype=FP32):
    """Four rows of x0 in the seven of the sum, and five of the output."""
    x0_subset = torch.tensor([1, 0, 2, 0, 4, 3, 0], dtype=torch.int32)
    out_subset = torch.tensor([0, 1, 2, 0, 3, 5, 4], dtype=torch.int32)
    tensors = {
        "x0": torch.randn(4, 40).to(dtype),
        "residual": torch.randn(7, 40),
        "weight": torch.randn(40),
        "bias": torch.randn(40),
        "layerscale": torch.randn(40),
    }
    return tensors, x0_subset, out_subset


def subset_definition(t, x0_subset, out_subset, mask, p, scale):
    kept = torch.where(mask, t["x0"] / (1 - p), 0.0) * scale * t["layerscale"]
    has_x0, has_out = x0_subset > 0, out_subset > 0
    rows = kept[(x0_subset[has_x0] - 1).long()]
    x = t["residual"].index_put((has_x0.nonzero()[:, 0],), rows, accumulate=True)
    out = F.layer_norm(x, x.shape[-1:], t["weight"], t["bias"], EPSILON)
    order = (out_subset[has_out] - 1).long().argsort()
    return out[has_out][order], x


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_subsets(dtype, operator_isa):
    tensors, x0_subset, out_subset = subset_case(dtype)
    masks = []

    def run(t):
        out, x, mask = ln.dropout_add_layer_norm_subset(
            **t,
            dropout_p=0.25,
            epsilon=EPSILON,
            x0_subset=x0_subset,
            out_subset=out_subset,
            rowscale_const=1.5,
            out_numrows=5,
            prenorm=True,
            return_dropout_mask=True,
        )
        masks.append(mask)
        return out, x

    douts = [torch.randn(5, 40).to(dtype), torch.randn(7, 40)]
    actual = norm_cases.results_and_gradients(run, tensors, douts)
    exact = norm_cases.results_and_gradients(
        lambda t: subset_definition(t, x0_subset, out_subset, masks[0], 0.25, 1.5),
        {n: t.double() for n, t in tensors.items()},
        douts,
    )
    tolerance = 1e-4 if dtype == FP32 else 3e-2
    for name in actual:
        close(actual[name].double(), exact[name], rtol=tolerance, atol=tolerance)


def test_rows_that_no_subset_names_are_zero():
    x0 = torch.randn(5, 8, requires_grad=True)
    subset = torch.tensor([2, 0, 4])
    out = ln.dropout_add_layer_norm_subset(
        x0, None, None, None, 0.0, EPSILON, x0_subset=subset, out_subset=subset, out_numrows=6
    )
    assert out.shape == (6, 8)
    assert not out[[0, 2, 4, 5]].any()
    (dx0,) = torch.autograd.grad(out[:, 0].sum(), x0)
    assert not dx0[[0, 2, 4]].any()
    assert dx0[[1, 3]].any(-1).all()


@pytest.mark.parametrize("name", ["x0_subset", "out_subset"])
@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([1, 6, 2], r"{}\[1\] must be from 0 to 5, got 6"),
        ([1, 2, -1], r"{}\[2\] must be from 0 to 5, got -1"),
        ([3, 0, 3], r"{}\[2\] names row 3 a second time"),
    ],
)
def test_bad_subsets(name, entries, sentence):
    subsets = {"x0_subset": torch.tensor([1, 2, 3]), "out_subset": torch.tensor([1, 2, 3])}
    subsets[name] = torch.tensor(entries)
    with pytest.raises(RuntimeError, match=sentence.format(name)):
        ln.dropout_add_layer_norm_subset(
            torch.randn(5, 8), None, None, None, 0.0, EPSILON, out_numrows=5, **subsets
        )


# ------------------------------------------------------------------------------------------------
# Functions by their names


def test_layer_norm_module():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    weight, bias, scale, rows = torch.randn(16), torch.randn(16), torch.randn(16), torch.rand(2, 3)
    close(ln.layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias))
    out, summed = ln.dropout_add_layer_norm(
        x, residual, weight, bias, 0.0, 1e-5, rowscale=rows, layerscale=scale, prenorm=True
    )
    close(summed, x * rows[..., None] * scale + residual)
    close(out, F.layer_norm(summed, (16,), weight, bias))
    out0, out1, summed, mask0, mask1 = ln.dropout_add_layer_norm_parallel_residual(
        x, residual, None, weight, bias, scale, None, 0.0, 1e-5, True, True, True
    )
    close(summed, x + residual)
    close(out0, F.layer_norm(summed, (16,), weight, bias))
    close(out1, F.layer_norm(summed, (16,), scale))
    assert mask0.all()
    assert mask1.shape == x.shape
    out0, out1 = ln.dropout_add_layer_norm_parallel_residual(
        x, None, residual, weight, bias, None, None, 0.0, 1e-5
    )
    assert out1 is None
    assert ln.maybe_align(x) is x
    assert ln.maybe_align(x.flatten()[1:]).data_ptr() % 16 == 0


def test_residual_in_fp32():
    x = torch.randn(3, 16).to(BF16)
    for norm in (ln.dropout_add_layer_norm, rms.dropout_add_rms_norm):
        out, summed = norm(x, None, torch.ones(16), None, 0.0, 1e-5, None, None, True, True)
        assert (out.dtype, summed.dtype) == (BF16, FP32)
    out, summed = triton.layer_norm_fn(x, None, None, prenorm=True, residual_in_fp32=True)
    assert (out.dtype, summed.dtype) == (BF16, FP32)
    assert torch.equal(summed, x.float())


def test_rms_norm_module():
    x, residual, weight = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(16)
    exact = F.rms_norm(x, (16,), weight, 1e-5)
    close(rms.rms_norm(x, weight, 1e-5), exact)
    out = rms.dropout_add_rms_norm(x, residual, weight, None, 0.0, 1e-5)
    close(out, F.rms_norm(x + residual, (16,), weight, 1e-5))
    out0, out1 = rms.dropout_add_rms_norm_parallel_residual(
        x, residual, None, weight, None, weight, None, 0.0, 1e-5
    )
    close(out0, out)
    close(out1, out)
    subset = torch.arange(1, 7)
    args = x.flatten(0, 1), residual, weight, None, 0.0, 1e-5
    close(rms.dropout_add_rms_norm_subset(*args, x0_subset=subset), out)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (ln.DropoutAddLayerNorm, {"p": 0.5, "prenorm": True}),
        (rms.DropoutAddRMSNorm, {"p": 0.5, "prenorm": True}),
        (rms.RMSNorm, {}),
        (triton.RMSNorm, {"dropout_p": 0.5}),
        (triton.RMSNorm, {"zero_centered_weight": True}),
    ],
)
def test_modules(module, arguments):
    norm = module(16, **arguments)
    x = torch.randn(3, 16)
    dropped = torch.equal(first(norm(x)), first(norm(x)))
    assert dropped == ("p" not in arguments and "dropout_p" not in arguments)
    norm.eval()
    expected = F.layer_norm(x, (16,)) if module is ln.DropoutAddLayerNorm else F.rms_norm(x, (16,))
    close(first(norm(x)), expected, rtol=1e-4, atol=1e-4)
    names = {"weight", "bias"} if module is ln.DropoutAddLayerNorm else {"weight"}
    assert set(dict(norm.named_parameters())) == names


def first(results):
    return results[0] if isinstance(results, tuple) else results


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_references_and_function_agree(is_rms_norm, upcast):
    torch.manual_seed(0)
    norm, ref = (
        (triton.rms_norm_fn, triton.rms_norm_ref)
        if is_rms_norm
        else (triton.layer_norm_fn, triton.layer_norm_ref)
    )
    x, residual, x1 = (torch.randn(2, 3, 16) for _ in range(3))
    weight, bias, weight1, bias1 = (torch.randn(16) for _ in range(4))
    rows = torch.rand(2, 3)
    args = x, weight, bias, residual, x1, weight1, bias1, 1e-5, 0.3, rows, True
    *results, mask, mask1 = norm(*args, zero_centered_weight=True, return_dropout_mask=True)
    close(tuple(results), ref(*args, True, mask, mask1, upcast), rtol=1e-4, atol=1e-4)
    close(triton.LayerNormFn.apply(x, weight, bias), triton.layer_norm_ref(x, weight, bias))


def test_forward_and_backward_without_autograd():
    x, residual, weight = torch.randn(5, 16), torch.randn(5, 16), torch.randn(16)
    torch.manual_seed(0)
    out, _, mean, rstd, summed, seeds, *_ = triton._layer_norm_fwd(
        x, weight, None, 1e-5, residual, dropout_p=0.5
    )
    dy = torch.randn(5, 16)
    dx, dweight, dbias, dresidual, dx1, _, _, again = triton._layer_norm_bwd(
        dy,
        summed,
        weight,
        None,
        1e-5,
        mean,
        rstd,
        seeds=seeds,
        dropout_p=0.5,
        has_residual=True,
        recompute_output=True,
    )
    assert dbias is None
    assert dx1 is None
    close(again, out)
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    exact = triton.layer_norm_fn(leaves[0], leaves[1], None, leaves[2], eps=1e-5, dropout_p=0.5)
    close((dx, dweight, dresidual), torch.autograd.grad(exact, leaves, dy))


def pulled(run, leaves, douts):
    """Results of ``run`` after seed 0, and gradients of the leaves."""
    torch.manual_seed(0)
    results = run(*(t.requires_grad_() for t in leaves))
    return torch.autograd.grad(results, leaves, douts)


def test_forward_and_backward_by_masks():
    x0, residual, dz, dx = torch.randn(4, 5, 16)
    gamma, beta, colscale, rowscale = (
        torch.randn(16),
        torch.randn(16),
        torch.randn(16),
        torch.rand(5),
    )
    torch.manual_seed(0)
    out, x, dmask, mu, rsigma = ln._dropout_add_layer_norm_forward(
        x0, residual, gamma, beta, rowscale, colscale, 0.5, 1e-5
    )
    actual = ln._dropout_add_layer_norm_backward(
        dz, dx, x, x0, dmask, mu, rsigma, gamma, rowscale, colscale, 0.5, True
    )
    leaves = x0, residual, gamma, beta, colscale

    def run(x0, residual, gamma, beta, colscale):
        args = x0, residual, gamma, beta, 0.5, 1e-5, rowscale, colscale, True
        return ln.dropout_add_layer_norm(*args)

    close(actual, pulled(run, leaves, (dz, dx)))
    assert out.shape == dmask.shape == x0.shape


def test_subsets_by_masks():
    tensors, x0_subset, out_subset = subset_case()
    x0, residual, gamma, beta, colscale = tensors.values()
    dz, dx = torch.randn(5, 40), torch.randn(7, 40)
    subsets = x0_subset, out_subset
    torch.manual_seed(0)
    _, x, dmask, mu, rsigma = ln._dropout_add_layer_norm_subset_forward(
        x0, residual, gamma, beta, colscale, *subsets, 0.25, 1e-5, 1.5, 5, False, True
    )
    actual = ln._dropout_add_layer_norm_subset_backward(
        dz, dx, x, x0, dmask, mu, rsigma, gamma, colscale, *subsets, 0.25, 1.5, 4, True, True
    )

    def run(x0, residual, gamma, beta, colscale):
        args = x0, residual, gamma, beta, 0.25, 1e-5, colscale, *subsets, 1.5, 5, True
        return rms.dropout_add_rms_norm_subset(*args)

    close(actual, pulled(run, tuple(tensors.values()), (dz, dx)))


def test_parallel_residual_by_masks():
    x0, x1, residual, dz0, dz1, dx = torch.randn(6, 5, 16)
    weights = tuple(torch.randn(4, 16).unbind())
    torch.manual_seed(0)
    _, _, x, *masks, mu, rsigma = ln._dropout_add_layer_norm_parallel_residual_forward(
        x0, x1, residual, *weights, 0.5, 1e-5
    )
    actual = ln._dropout_add_layer_norm_parallel_residual_backward(
        dz0, dz1, dx, x, *masks, mu, rsigma, weights[0], weights[2], 0.5, True, True
    )

    def run(*tensors):
        return ln.dropout_add_layer_norm_parallel_residual(*tensors, 0.5, 1e-5, True)

    close(actual, pulled(run, (x0, x1, residual, *weights), (dz0, dz1, dx)))


@pytest.mark.parametrize("grad", [False, True])
def test_given_results(grad):
    x = torch.randn(4, 16, requires_grad=grad)
    residual, weight = torch.randn(4, 16), torch.randn(16)
    out, summed = torch.empty(4, 16, dtype=BF16), torch.empty(4, 16)
    results = triton.layer_norm_fn(
        x, weight, None, residual, prenorm=True, out=out, residual_out=summed
    )
    assert results[0] is out
    assert results[1] is summed
    close(summed, x + residual)
    close(out, triton.layer_norm_fn(x, weight, None, residual, out_dtype=BF16))
    if grad:
        (dx,) = torch.autograd.grad(out.float().sum() + summed.sum(), x)
        assert dx.shape == x.shape


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"prenorm": True}, {"residual_in_fp32": True}])
def test_linear_after_norm(is_rms_norm, options):
    torch.manual_seed(0)
    x, weight, linear = torch.randn(2, 3, 16), torch.randn(16), torch.randn(8, 16)
    bias, linear_bias, residual = torch.randn(16), torch.randn(8), torch.randn(2, 3, 16)
    residual = None if "residual_in_fp32" in options else residual
    leaves = [t for t in (x, weight, bias, linear, linear_bias, residual) if t is not None]
    leaves = [t.requires_grad_() for t in leaves]
    args = x, weight, bias, linear, linear_bias, residual, 1e-5
    results = triton.layer_norm_linear_fn(*args, is_rms_norm=is_rms_norm, **options)
    summed = x if residual is None else x + residual
    norm = triton.rms_norm_ref if is_rms_norm else triton.layer_norm_ref
    exact = F.linear(norm(summed, weight, bias, eps=1e-5), linear, linear_bias)
    exact = (exact, summed) if "prenorm" in options else (exact,)
    results = results if isinstance(results, tuple) else (results,)
    close(results, exact, rtol=1e-4, atol=1e-4)
    douts = [torch.randn_like(r) for r in results]
    close(
        torch.autograd.grad(results, leaves, douts),
        torch.autograd.grad(exact, leaves, douts),
        rtol=1e-4,
        atol=1e-4,
    )


def test_linear_after_norm_keeps_no_output():
    """Of what the backward needs the norm's output is not part."""
    x, weight, linear = torch.randn(64, 128), torch.randn(128), torch.randn(8, 128)
    leaves = [t.requires_grad_() for t in (x, weight, linear)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        triton.layer_norm_linear_fn(leaves[0], leaves[1], None, leaves[2], None)
    sizes = [t.numel() for t in kept if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves}]
    assert max(sizes) <= 64


# ------------------------------------------------------------------------------------------------
# Inside torch


def test_autocast():
    x, weight, linear = torch.randn(4, 16), torch.randn(16), torch.randn(8, 16)
    leaves = [t.requires_grad_() for t in (x, weight, linear)]
    with torch.autocast("cpu", BF16):
        assert triton.layer_norm_fn(x, weight, None).dtype == FP32
        assert triton.layer_norm_fn(x.to(BF16), weight, None).dtype == BF16
        out = triton.layer_norm_linear_fn(x, weight, None, linear, None)
    assert out.dtype == BF16
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert [g.dtype for g in grads] == [FP32] * 3
    exact = F.linear(F.layer_norm(x, (16,), weight, eps=1e-6), linear).sum()
    close(grads, torch.autograd.grad(exact, leaves), rtol=5e-2, atol=5e-1)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_one_graph(p):
    def run(x, weight, residual, linear):
        out, residual = triton.rms_norm_fn(x, weight, None, residual, dropout_p=p, prenorm=True)
        out = ln.dropout_add_layer_norm(out, residual, weight, None, p, 1e-5)
        return triton.layer_norm_linear_fn(out, weight, None, linear, None)

    shapes = (3, 5, 16), (16,), (3, 5, 16), (8, 16)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for f in (run, compiled):
        torch.manual_seed(4)
        out = f(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    close(*results)


def forward_arguments(**given):
    """All arguments of the operator, in their order."""
    defaults = {
        "rowscale_const": 1.0,
        "epsilon": 1e-5,
        "dropout_p": 0.0,
        "is_rms_norm": False,
        "zero_centered_weight": False,
        "out_numrows": 0,
        "out_dtype": FP32,
        "residual_dtype": FP32,
        "wants_x": True,
        "wants_mask": False,
    }
    names = [a.name for a in ops.layer_norm_fwd.default._schema.arguments]
    return tuple((defaults | given).get(name) for name in names)


@pytest.mark.parametrize("given", [{}, {"is_rms_norm": True}, {"colscale": 1, "residual": 1}])
def test_opcheck(given):
    shapes = {"x0": (3, 8), "residual": (3, 8), "weight": (8,), "colscale": (8,)}
    tensors = {
        name: torch.randn(shape, requires_grad=True)
        for name, shape in shapes.items()
        if name in ("x0", "weight") or given.get(name)
    }
    opcheck(ops.layer_norm_fwd.default, forward_arguments(**given | tensors))


def test_opcheck_backward():
    x, dout, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    _, _, mean, rstd, *_ = triton._layer_norm_fwd(x, weight, None, 1e-5)
    rng_state = torch.zeros(2, dtype=torch.int64)
    tensors = x, dout, None, dout, None, mean, rstd, rng_state, *(None,) * 4, weight, *(None,) * 3
    numbers = 1.0, 1e-5, 0.0, False, False, 0, FP32, True, FP32, FP32
    opcheck(ops.layer_norm_bwd.default, (*tensors, *numbers))


def test_second_derivative_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    out = triton.layer_norm_fn(x, None, None)
    (dx,) = torch.autograd.grad(out, x, torch.ones(3, 8), create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_fwd has no second derivative"):
        (x.square().sum() + dx.square().sum()).backward()


# ------------------------------------------------------------------------------------------------
# The C interface

_FORWARD = (
    "x0 x1 residual weight rowscale_const epsilon p_dropout rng_state out x dropout_mask rstd"
)
_forward = bind("layer_norm_fwd", _FORWARD)


def forward_in_c(**given):
    """Call it with ones for what must be given."""
    x = torch.ones(3, 8)
    defaults = {"x0": x, "out": torch.full((3, 8), 5.0), "rowscale_const": 1.0, "epsilon": 1e-5}
    given = {"p_dropout": 0.0} | defaults | given
    _forward(*(given.get(name) for name in _FORWARD.split()))


@pytest.mark.parametrize("n", [8, 13])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nothing_beside_the_tensors_is_touched(n, dtype, operator_isa):
    """Inputs and outputs are columns in the middle of NaN."""
    wide = torch.full((5, 6, n + 9), torch.nan).to(dtype)
    x0, residual, out, x = wide[:4, :, 3 : 3 + n]
    x0.copy_(torch.randn(6, n))
    residual.copy_(torch.randn(6, n))
    forward_in_c(x0=x0, residual=residual, out=out, x=x)
    close(out, F.layer_norm((x0 + residual), (n,)), rtol=2e-2, atol=2e-2)
    assert wide[:, :, :3].isnan().all()
    assert wide[:, :, 3 + n :].isnan().all()
    assert wide[4].isnan().all()


def test_results_may_lie_where_inputs_do():
    x0, residual = torch.randn(6, 40), torch.randn(6, 40)
    summed, out = x0 + residual, F.layer_norm(x0 + residual, (40,))
    forward_in_c(x0=x0, residual=residual, out=x0, x=residual)
    close(residual, summed)
    close(x0, out)


def test_gradients_may_lie_where_inputs_do():
    run = bind(
        "layer_norm_bwd", "x dout dx x0 colscale rstd rowscale_const is_rms_norm dx0 dcolscale"
    )
    x, dout, dx = torch.randn(3, 6, 40)
    rstd = x.square().mean(-1).rsqrt()
    norm = x * rstd[:, None]
    exact = rstd[:, None] * (dout - norm * (dout * norm).mean(-1, keepdim=True)) + dx
    for place in (dout.clone(), dx.clone()):
        given = [place if torch.equal(t, place) else t for t in (x, dout, dx)]
        run(*given, None, None, rstd, 1.0, 1, place, None)
        close(place, exact)
    with pytest.raises(RuntimeError, match="dx0 must not share memory with x0"):
        run(x, dout, None, dx, torch.ones(40), rstd, 1.0, 1, dx, torch.empty(40))


BAD = {
    "epsilon must not be negative, got -1": {"epsilon": -1.0},
    "p_dropout must be from 0 to 1, got 1.5": {"p_dropout": 1.5},
    "rng_state must be given": {"p_dropout": 0.5},
    r"weight must have shape \(cols\)": {"weight": torch.ones(7)},
    r"residual must have shape \(rows, cols\)": {"residual": torch.ones(3, 7)},
    r"out must have 3 rows, got 4": {"out": torch.zeros(4, 8)},
    "layer norm takes fp16, bf16 and fp32": {"x0": torch.ones(3, 8, dtype=FP64)},
    "matrices must have contiguous rows": {"x0": torch.ones(3, 16)[:, ::2]},
    "weight must be contiguous": {"weight": torch.ones(16)[::2]},
    "x must not overlap itself": {"x": torch.zeros(1, 8).expand(3, 8)},
    "rstd must have dtype fp32": {"rstd": torch.zeros(3, dtype=FP16)},
    "dropout masks are made where p_dropout > 0.0": {
        "dropout_mask": torch.zeros(3, 2, dtype=torch.int32)
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments_write_nothing(sentence):
    out = torch.full((3, 8), 5.0)
    with pytest.raises(RuntimeError, match=sentence):
        forward_in_c(**{"out": out} | BAD[sentence])
    assert (out == 5.0).all()


def test_views_of_one_memory():
    memory = torch.zeros(3, 20)
    with pytest.raises(RuntimeError, match="out and x0 must not share memory"):
        forward_in_c(x0=memory[:, :8], out=memory[:, 4:12])


def test_bad_arguments_of_functions():
    x = torch.randn(3, 8)
    with pytest.raises(TypeError, match=r"^weight must be a torch.Tensor"):
        triton.layer_norm_fn(x, [1.0], None)
    with pytest.raises(TypeError, match=r"^x0 must be a torch.Tensor"):
        ln.layer_norm([1.0], None, None, 1e-5)
    with pytest.raises(TypeError, match=r"^epsilon must be a number"):
        ln.layer_norm(x, None, None, "1e-5")
    with pytest.raises(ValueError, match=r"rowscale must have the shape"):
        triton.layer_norm_fn(x, None, None, rowscale=torch.ones(2))
    with pytest.raises(ValueError, match=r"x1 must have the shape"):
        add_norm_into(None, torch.empty(3, 8), x, None, None, 1e-5, x1=torch.ones(3, 9))
