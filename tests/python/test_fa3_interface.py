"""FlashAttention-3's names, signatures, operators' schemas and refusals, and torch.compile."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch
from fa3_cases import Case, Problem
from reference import INF
from scripts import ROOT

from flash_attn import v3
from flash_attn.v3 import interface

# As FlashAttention-3 has them.
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
SCHEDULE = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
SIGNATURES = {
    "maybe_contiguous": "x",
    "round_multiple": "x, m",
    "round_up_headdim": "head_size",
    "flash_attn_qkvpacked_func": f"qkv, softmax_scale=None, causal=False, {DESCALES}, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, "
    "sm_margin=0, return_attn_probs=False",
    "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALES}, "
    f"window_size=(-1, -1), attention_chunk=0, softcap=0.0, {SCHEDULE}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, {DESCALES}, "
    f"window_size=(-1, -1), attention_chunk=0, softcap=0.0, {SCHEDULE}",
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, "
    f"rotary_seqlens=None, {DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False",
    "get_scheduler_metadata": "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, "
    "headdim, cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
    "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, "
    "window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, "
    "sm_margin=0",
    "_flash_attn_forward": "q, k, v, k_new=None, v_new=None, qv=None, out_=None, "
    "cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, "
    f"rotary_cos=None, rotary_sin=None, seqlens_rotary=None, {DESCALES}, softmax_scale=None, "
    "causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0",
    "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, "
    "cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, "
    "window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0",
}
EXTENDED = {  # by the keyword s_aux
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
}
# As FlashAttention-3 declares its operators: "?" is optional, "!" written to. A default that is not
# said may be None here, so that calls with fewer arguments pass.
SCHEMAS = {
    "fwd": "q, k, v, k_new!?, v_new!?, q_v?, out!?, cu_seqlens_q?, cu_seqlens_k?, "
    "cu_seqlens_k_new?, seqused_q?, seqused_k?, int? max_seqlen_q, int? max_seqlen_k, "
    "page_table?, kv_batch_idx?, leftpad_k?, rotary_cos?, rotary_sin?, seqlens_rotary?, "
    "q_descale?, k_descale?, v_descale?, float? softmax_scale, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0, "
    "bool is_rotary_interleaved=False, scheduler_metadata?, int num_splits=0, bool? pack_gqa, "
    "int sm_margin=0",
    "bwd": "dout, q, k, v, out, softmax_lse, dq!?, dk!?, dv!?, cu_seqlens_q?, cu_seqlens_k?, "
    "seqused_q?, seqused_k?, int? max_seqlen_q, int? max_seqlen_k, float? softmax_scale, "
    "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0, "
    "bool deterministic=False, int sm_margin=0",
    "fwd_combine": "out_partial, lse_partial, out!?, ScalarType? out_dtype",
    "get_scheduler_metadata": "int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, "
    "int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, seqused_k, "
    "cu_seqlens_q?, cu_seqlens_k?, cu_seqlens_k_new?, seqused_q?, leftpad_k?, int? page_size, "
    "int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, int num_splits=0, "
    "bool? pack_gqa, int sm_margin=0",
}
RESULTS = {"fwd": 4, "bwd": 5, "fwd_combine": 2, "get_scheduler_metadata": 1}
TYPES = {"int": "int", "float": "float", "bool": "bool", "ScalarType": "int", "": "Tensor"}


@pytest.fixture
def hopper(monkeypatch):
    """Makes the modules of the distribution flash-attn-3 importable."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        monkeypatch.syspath_prepend(str(ROOT / "hopper"))


def parameters_of(text):
    namespace = {"torch": torch}
    exec(f"def f({text}): pass", namespace)
    return [
        (p.name, p.kind, p.default) for p in inspect.signature(namespace["f"]).parameters.values()
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = list(inspect.signature(getattr(interface, name)).parameters.values())
    if name in EXTENDED:
        extension = parameters.pop()
        assert (extension.name, extension.kind, extension.default) == (
            "s_aux",
            extension.KEYWORD_ONLY,
            None,
        )
    found = [(p.name, p.kind, p.default) for p in parameters]
    assert found == parameters_of(SIGNATURES[name])


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    schema = getattr(torch.ops.flash_attn_3, name).default._schema
    expected = [
        re.fullmatch(r"(?:(\w+)(\??) )?(\w+)(!?)(\??)(?:=(\S+))?", x).groups()
        for x in SCHEMAS[name].split(", ")
    ]
    assert [a.name for a in schema.arguments] == [x[2] for x in expected]
    for argument, (kind, optional, _, written, optional_tensor, default) in zip(
        schema.arguments, expected
    ):
        kind = TYPES[kind or ""]
        assert str(argument.type) == (f"Optional[{kind}]" if optional or optional_tensor else kind)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        assert is_written == bool(written)
        if default is not None:
            assert argument.default_value == eval(default)
        else:
            assert argument.default_value is None
        assert not argument.kwarg_only
    assert len(schema.returns) == RESULTS[name]


@pytest.mark.parametrize("name", ["_flash_attn_forward", "_flash_attn_backward"])
def test_schema_of_functions(name):
    """These operators have the parameters, order and defaults of the functions of their names."""
    schema = getattr(torch.ops.flash_attn_3, name).default._schema
    parameters = inspect.signature(getattr(interface, name)).parameters.values()
    assert [a.name for a in schema.arguments] == [p.name for p in parameters]
    for argument, parameter in zip(schema.arguments, parameters):
        assert argument.has_default_value() == (parameter.default is not parameter.empty)
        assert not argument.has_default_value() or argument.default_value == parameter.default
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == (["dq", "dk", "dv"] if name == "_flash_attn_backward" else [])


def test_modules(hopper):
    """Everything that others import, under both names, is what flash_attn.v3 has."""
    module = importlib.import_module("flash_attn_interface")
    package = importlib.import_module("flash_attn_3.flash_attn_interface")
    importlib.import_module("flash_attn_3._C")
    for name in (*SIGNATURES, "FlashAttnFunc", "FlashAttnVarlenFunc", "FlashAttnQKVPackedFunc"):
        assert getattr(module, name) is getattr(package, name) is getattr(interface, name)
    assert module.USE_TRITON_ROCM is False
    flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    assert [name for name, x in flags.items() if x] == ["FLASHATTENTION_DISABLE_FP8"]
    assert "FLASHATTENTION_DISABLE_PAGEDKV" in flags


def test_the_distribution(tmp_path):
    """Its wheel is named as clients ask: flash_attn_interface belongs to flash-attn-3."""
    pytest.importorskip("scikit_build_core")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, "install", *options, str(ROOT / "hopper")], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from importlib import metadata\n"
        "import flash_attn_interface, flash_attn_3\n"
        "print(flash_attn_interface.__file__)\n"
        "print(metadata.packages_distributions()['flash_attn_interface'])\n"
        "print(flash_attn_3.__version__ == metadata.version('flash_attn_3'))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    file, distributions, same = run.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert distributions == "['flash-attn-3']"
    assert same == "True"


def test_round_up_headdim():
    dims = [1, 64, 65, 96, 128, 129, 192, 256, 512]
    rounded = [64, 64, 96, 96, 128, 192, 192, 256, 256]
    assert [interface.round_up_headdim(d) for d in dims] == rounded


def test_apply():
    """The classes behind the functions take their arguments by position."""
    q, k, v = torch.randn(3, 1, 9, 2, 16)
    out, lse = interface.FlashAttnFunc.apply(
        *(q, k, v, 0.3, True, None, None, None, None, (4, 0), 0, 2.0, 1, None, False, 0, True)
    )
    expected = v3.flash_attn_func(q, k, v, 0.3, True, window_size=(4, 0), softcap=2.0)
    assert torch.equal(out, expected)
    assert lse.shape == (1, 2, 9)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    used = torch.tensor([4, 3], dtype=torch.int32)
    sequences = (cu, cu, None, used, 5, 5)
    out = interface.FlashAttnVarlenFunc.apply(q[0], k[0], v[0], *sequences, None, True)
    expected = v3.flash_attn_varlen_func(
        q[0], k[0], v[0], cu, cu, 5, 5, seqused_k=used, causal=True
    )
    assert torch.equal(out, expected)
    qkv = torch.stack([q, k, v], 2)
    out = interface.FlashAttnQKVPackedFunc.apply(qkv, None, True)
    assert torch.equal(out, v3.flash_attn_func(q, k, v, causal=True))


# ------------------------------------------------------------------------------------------------
# The functions and operators without the public names


CALLS = {
    "dense": Case(causal=True, is_dense=True, lengths=((40, 30),) * 2),
    "packed": Case(causal=True, window_size=(20, 0), softcap=3.0),
    "used": Case(causal=True, used=True),
    "used-dense": Case(used=True, is_dense=True, lengths=((40, 30),) * 2),
}


@pytest.mark.parametrize("by", ["function", "operator", "bwd"])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name, by):
    """_flash_attn_forward and _flash_attn_backward, as ring attention calls them."""
    case = CALLS[name]
    problem = Problem(case)
    problem.dlse.zero_()
    expected = problem.call()
    given = dict(problem.tensors)
    dout = problem.dout
    if case.is_dense:
        given = {n: x.unflatten(0, (2, -1)) for n, x in given.items()}
        dout = dout.unflatten(0, (2, -1))
    q, k, v = (given[n] for n in "qkv")
    sequences, used = (None,) * 4, (None, None)
    if not case.is_dense:
        sequences = (*problem.cumulative(), *(max(n) for n in zip(*case.lengths)))
    if case.used:
        used = tuple(torch.tensor(n, dtype=torch.int32) for n in zip(*problem.used))
    cu_q, cu_k, max_q, max_k = sequences
    library = torch.ops.flash_attn_3 if by != "function" else interface
    score = {
        "window_size_left": case.window_size[0],
        "window_size_right": case.window_size[1],
        "softcap": case.softcap,
    }
    out, lse, *rest = library._flash_attn_forward(
        *(q, k, v),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        seqused_q=used[0],
        seqused_k=used[1],
        causal=case.causal,
        **score,
    )
    assert [x.numel() for x in rest] == [0, 0]
    if case.used and not case.causal:  # rows that are not used, or have no key
        lse = lse.masked_fill(lse == -INF, float("nan"))
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    if by == "bwd":
        softmax_d, *_ = torch.ops.flash_attn_3.bwd(
            *(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, *used, max_q, max_k),
            is_causal=case.causal,
            **score,
        )
    else:
        softmax_d = library._flash_attn_backward(
            *(dout, q, k, v, out, lse, cu_q, cu_k, *used, max_q, max_k, dq, dk, dv),
            is_causal=case.causal,
            **score,
        )
    assert softmax_d.dtype == torch.float32
    found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    for n, x in found.items():
        x = x.flatten(0, 1) if case.is_dense else x
        assert torch.equal(x, expected[n]), n


def test_gradients_into_strided_tensors():
    """dq, dk and dv may be parts of one packed tensor."""
    q, k, v, dout = torch.randn(4, 2, 9, 2, 16)
    out, lse, *_ = interface._flash_attn_forward(q, k, v, causal=True)
    plain = [torch.empty_like(x) for x in (q, k, v)]
    packed = torch.full((2, 9, 3, 2, 16), float("nan"))
    used = torch.tensor([9, 9], dtype=torch.int32)
    for gradients, more in ((plain, {}), (packed.unbind(2), {"sequed_k": used})):
        dq, dk, dv = gradients
        interface._flash_attn_backward(
            *(dout, q, k, v, out, lse), dq=dq, dk=dk, dv=dv, is_causal=True, **more
        )
    assert torch.equal(packed, torch.stack(plain, 2))


def test_backward_of_a_merge():
    """Of two halves of the keys with the softmax_lse of both, as ring attention needs it."""
    q, k, v, dout = torch.randn(4, 1, 20, 2, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = v3.flash_attn_func(*leaves, return_attn_probs=True)
    expected = torch.autograd.grad(out, leaves, dout)
    dq, dk, dv = torch.zeros_like(q), [], []
    for half in (slice(0, 8), slice(8, 20)):
        parts = [torch.empty_like(q), torch.empty_like(k[:, half]), torch.empty_like(v[:, half])]
        interface._flash_attn_backward(
            *(dout, q, k[:, half], v[:, half], out.detach(), lse.detach()),
            dq=parts[0],
            dk=parts[1],
            dv=parts[2],
        )
        dq += parts[0]
        dk.append(parts[1])
        dv.append(parts[2])
    for actual, exact in zip((dq, torch.cat(dk, 1), torch.cat(dv, 1)), expected):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)


def test_operators_are_differentiable():
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(v3.flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    for operator in ("fwd", "_flash_attn_forward"):
        causal = {"is_causal" if operator == "fwd" else "causal": True}
        out = getattr(torch.ops.flash_attn_3, operator)(q, k, v, **causal)[0]
        actual = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_operator_of_a_cache():
    """fwd appends to k and v where new tokens are given; all arguments by position."""
    cache = torch.randn(2, 2, 20, 2, 16)
    by_function = cache.clone()
    q, k, v = torch.randn(2, 3, 4, 16), *torch.randn(2, 2, 3, 2, 16)
    seqlens = torch.tensor([4, 9], dtype=torch.int32)
    angle = torch.rand(40, 8) * 6
    rotary = (angle.cos(), angle.sin())
    expected, lse, *_ = v3.flash_attn_with_kvcache(
        *(q, *by_function, k, v),
        rotary_cos=rotary[0],
        rotary_sin=rotary[1],
        cache_seqlens=seqlens,
        causal=True,
        rotary_interleaved=False,
        return_softmax_lse=True,
    )
    out = torch.empty_like(q)
    results = torch.ops.flash_attn_3.fwd(
        *(q, *cache, k, v, None, out, None, None, None, None, seqlens, None, None, None),
        *(None, None, *rotary, None, None, None, None, None, True, -1, -1, 0, 0.0, False),
        *(None, 0, None, 0),
    )
    assert results[0] is out or results[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    assert torch.equal(results[1], lse)
    assert torch.equal(cache, by_function)


def test_scheduler_metadata():
    seqlens = torch.tensor([3, 4, 5, 6, 7], dtype=torch.int32)
    sizes = {"max_seqlen_q": 1, "max_seqlen_k": 7, "headdim": 64, "cache_seqlens": seqlens}
    found = v3.get_scheduler_metadata(5, num_heads_q=8, num_heads_kv=2, **sizes)
    assert found.dtype == torch.int32
    assert found.dim() == 1
    by_operator = torch.ops.flash_attn_3.get_scheduler_metadata(
        5, 1, 7, 8, 2, 64, 64, torch.bfloat16, seqlens
    )
    assert torch.equal(by_operator, found)


# ------------------------------------------------------------------------------------------------
# torch.compile


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("options", [{}, {"attention_chunk": 4}, {"window_size": (3, 0)}], ids=str)
def test_compile_dense(options):
    q, k, v = (torch.randn(2, 9, 2, 16, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        out, lse = v3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **options)
        return (out * 2).sum() + lse.sum()

    expected = torch.autograd.grad(f(q, k, v), (q, k, v))
    actual = torch.autograd.grad(compiled(f)(q, k, v), (q, k, v))
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


def test_compile_packed_and_cache():
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    pages = torch.randn(2, 6, 4, 2, 16)
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    seqlens = torch.tensor([5, 12], dtype=torch.int32)

    def f(q, k, v):
        out = v3.flash_attn_varlen_func(
            q, k, v, cu, cu, 5, 5, seqused_k=seqlens.clamp_max(4), causal=True, attention_chunk=3
        )
        over_cache = v3.flash_attn_with_kvcache(
            q,
            *pages,
            page_table=table,
            cache_seqlens=seqlens,
            cu_seqlens_q=cu,
            max_seqlen_q=5,
            return_softmax_lse=True,
        )
        return out, *over_cache[:2]

    for actual, expected in zip(compiled(f)(q, k, v), f(q, k, v)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("is_latent", [False, True])
def test_compile_queries_of_values(is_latent):
    latent = torch.randn(2, 9, 1, 40)
    q, qv = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 4, 32)
    k, v = latent[..., 32:], latent[..., :32]
    if not is_latent:
        k, v = k.clone(), v.clone()

    def f(q, k, v, qv):
        return v3.flash_attn_func(q, k, v, qv=qv, causal=True)

    torch.testing.assert_close(compiled(f)(q, k, v, qv), f(q, k, v, qv))


def test_compile_operators():
    q, k, v, dout = torch.randn(4, 2, 9, 2, 16)

    def f(q, k, v, dout):
        out, lse, *_ = torch.ops.flash_attn_3._flash_attn_forward(q, k, v, causal=True)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        torch.ops.flash_attn_3._flash_attn_backward(
            *(dout, q, k, v, out, lse), dq=dq, dk=dk, dv=dv, is_causal=True
        )
        merged = v3.flash_attn_combine(torch.stack([out, out]), lse.mT.expand(2, 2, 9, 2))
        return out, lse, dq, dk, dv, *merged

    for actual, expected in zip(compiled(f)(q, k, v, dout), f(q, k, v, dout)):
        torch.testing.assert_close(actual, expected)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 9, 4, 16), torch.empty(2, 7, 2, 16)
        out, lse = v3.flash_attn_func(q, k, k, attention_chunk=4, return_attn_probs=True)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 9)
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, k, is_causal=True)
        assert out.shape == q.shape
        out, lse = v3.flash_attn_combine(torch.empty(3, 2, 9, 4, 16), torch.empty(3, 2, 9, 4))
        assert out.shape == q.shape
        assert lse.shape == (2, 9, 4)


# ------------------------------------------------------------------------------------------------
# Refusals


INT32 = torch.int32
Q, K = torch.randn(2, 6, 4, 16), torch.randn(2, 8, 2, 16)
FP8 = getattr(torch, "float8_e4m3fn", None)
CU_Q, CU_K = torch.tensor([0, 6, 12], dtype=INT32), torch.tensor([0, 8, 16], dtype=INT32)
LENGTHS = torch.tensor([3, 5], dtype=INT32)


def dense(**more):
    return v3.flash_attn_func(Q, K, K, **more)


def varlen(**more):
    given = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 6, "max_seqlen_k": 8}
    return v3.flash_attn_varlen_func(
        Q.flatten(0, 1), K.flatten(0, 1), K.flatten(0, 1), **{**given, **more}
    )


def cache(**more):
    given = {"q": Q, "k_cache": K, "v_cache": K, "cache_seqlens": LENGTHS}
    return v3.flash_attn_with_kvcache(**{**given, **more})


def packed_cache(**more):
    return cache(
        **{"q": Q.flatten(0, 1), "cu_seqlens_q": CU_Q, "max_seqlen_q": 6, **more},
    )


def ints(*values):
    return torch.tensor(values, dtype=INT32)


NEW = {"k": torch.zeros(3, 2, 16), "v": torch.zeros(3, 2, 16), "cu_seqlens_k_new": ints(0, 1, 3)}
TWO = torch.full((2, 2), 2.0)
METADATA = {
    "batch_size": 2,
    "max_seqlen_q": 1,
    "max_seqlen_k": 8,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "headdim": 64,
    "cache_seqlens": LENGTHS,
}
REFUSED = [
    (dense, {"q_descale": TWO}, NotImplementedError, "q_descale belongs to fp8"),
    (cache, {"v_descale": TWO}, NotImplementedError, "v_descale belongs to fp8"),
    (varlen, {"k_descale": TWO.double()}, ValueError, "k_descale must be fp32"),
    (dense, {"k_descale": 1.0}, TypeError, "k_descale must be a torch.Tensor"),
    (dense, {"attention_chunk": -1}, ValueError, "attention_chunk must not be negative"),
    (dense, {"attention_chunk": 1.5}, TypeError, "attention_chunk must be an int"),
    (dense, {"num_splits": 257}, ValueError, "num_splits must be from 0 to 256, got 257"),
    (dense, {"sm_margin": -2}, ValueError, "sm_margin must not be negative, got -2"),
    (cache, {"scheduler_metadata": torch.zeros(3)}, ValueError, "scheduler_metadata must be int32"),
    (cache, {"scheduler_metadata": 3}, TypeError, "scheduler_metadata must be a torch.Tensor"),
    (dense, {"qv": torch.zeros(2, 6, 4, 8)}, ValueError, "qv must have shape (2, 6, 4, 16)"),
    (dense, {"qv": Q.double()}, ValueError, "qv must have the dtype and device of q"),
    (varlen, {"max_seqlen_q": None}, ValueError, "max_seqlen_q must be provided"),
    (varlen, {"cu_seqlens_q": CU_Q.long()}, ValueError, "cu_seqlens_q must be int32"),
    (varlen, {"cu_seqlens_k": CU_K[:2]}, RuntimeError, "cu_seqlens_k"),
    (varlen, {"seqused_q": ints(7, 1)}, ValueError, "seqused_q[0] = 7 is outside"),
    (varlen, {"seqused_k": ints(1, -1)}, ValueError, "seqused_k[1] = -1 is outside"),
    (varlen, {"seqused_k": ints(1, 2, 3)}, ValueError, "seqused_k must be int32 with one"),
    (varlen, {"cu_seqlens_q": None}, ValueError, "q must have shape (batch, seqlen, nheads"),
    (cache, {"k": torch.zeros(2, 1, 2, 16)}, RuntimeError, "value must also be passed in"),
    (cache, {"cache_seqlens": None, **NEW}, ValueError, "cache_seqlens must be given"),
    (packed_cache, {"max_seqlen_q": None}, ValueError, "max_seqlen_q must be provided"),
    (packed_cache, {"q": Q}, ValueError, "q must have shape (total_q, nheads, headdim)"),
    (packed_cache, {"cache_seqlens": ints(9, 1)}, ValueError, "cache_seqlens[0] = 9"),
    (packed_cache, {"cache_batch_idx": ints(0, 2)}, ValueError, "from 0 to 1, got [0, 2]"),
    (packed_cache, {"page_table": ints(0, 7).view(2, 1)}, RuntimeError, "page_table[1][0] = 7"),
    (cache, {"page_table": ints(0, 7).view(2, 1)}, RuntimeError, "page_table[1][0] = 7"),
    (packed_cache, {"cache_leftpad": ints(0, 6)}, ValueError, "cache_leftpad[1] = 6 is outside"),
    (packed_cache, {"max_seqlen_q": 5}, ValueError, "max_seqlen_q = 5 is less than the 6 rows"),
    (
        varlen,
        {"max_seqlen_q": 5, "attention_chunk": 4},
        ValueError,
        "max_seqlen_q = 5 is less than the 6 rows of sequence 0",
    ),
    (
        varlen,
        {"cu_seqlens_k": ints(0, 8, 7), "attention_chunk": 4},
        ValueError,
        "cu_seqlens_k must not decrease: entry 2 is 7 after 8",
    ),
    (
        varlen,
        {"cu_seqlens_k": ints(0, 9, 18), "seqused_k": ints(1, 1)},
        ValueError,
        "less than the 9 rows",
    ),
    (packed_cache, {"page_table": CU_Q}, ValueError, "page_table must be int32 (2, max_pages"),
    (packed_cache, {**NEW, "cache_seqlens": ints(3, 7)}, ValueError, "cache_seqlens[1] = 7 plus 2"),
    (packed_cache, {**NEW, "page_table": ints(0, 5).view(2, 1)}, ValueError, "page_table names 5"),
    (
        packed_cache,
        {**NEW, "cache_batch_idx": ints(1, 1), "cache_seqlens": ints(5, 5)},
        ValueError,
        "cache_batch_idx appends twice",
    ),
    (packed_cache, {**NEW, "v": None}, ValueError, "k and v must be given together"),
    (packed_cache, {**NEW, "k": NEW["k"][:, :1]}, ValueError, "k must be torch.float32 of shape"),
    (
        packed_cache,
        {**NEW, "cu_seqlens_k_new": ints(0, 1, 4)},
        ValueError,
        "beyond the 3 rows of k",
    ),
    (packed_cache, {**NEW, "cu_seqlens_k_new": ints(0, 3, 2)}, ValueError, "decreases"),
    (
        packed_cache,
        {**NEW, "rotary_cos": torch.ones(5, 8), "rotary_sin": torch.zeros(5, 8)},
        ValueError,
        "rotary_cos has 5 rows",
    ),
    (packed_cache, {**NEW, "rotary_cos": torch.ones(9, 8)}, ValueError, "given together"),
    (
        packed_cache,
        {"rotary_cos": torch.ones(9, 8), "rotary_sin": torch.ones(9, 8)},
        ValueError,
        "k and v must be given",
    ),
    (
        lambda **more: v3.get_scheduler_metadata(**{**METADATA, **more}),
        {"num_heads_kv": 3},
        ValueError,
        "num_heads_kv must divide num_heads_q = 4, got 3",
    ),
    (
        lambda **more: v3.get_scheduler_metadata(**{**METADATA, **more}),
        {"cache_seqlens": ints(1)},
        ValueError,
        "cache_seqlens must be int32 with one dimension of 2 elements",
    ),
    (
        lambda **more: v3.flash_attn_combine(torch.zeros(2, 1, 3, 2, 8), **more),
        {"lse_partial": torch.zeros(2, 1, 2, 3)},
        ValueError,
        "lse_partial must have shape (2, 1, 3, 2)",
    ),
    (
        lambda **more: v3.flash_attn_combine(torch.zeros(2, 1, 3, 2, 8).half(), **more),
        {"lse_partial": torch.zeros(2, 1, 3, 2)},
        ValueError,
        "out_partial must be fp32",
    ),
]


@pytest.mark.parametrize(("function", "given", "error", "text"), REFUSED, ids=lambda x: str(x)[:60])
def test_refused(function, given, error, text):
    before = K.clone()
    with pytest.raises(error, match=re.escape(text)):
        function(**given)
    assert torch.equal(K, before)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"s_aux": torch.zeros(3)}, "s_aux"),
        ({"qv": torch.zeros(12, 4, 8)}, "qv must have shape (12, 4, 16)"),
        ({"q": Q.flatten(0, 1).half()}, "same dtype"),
        ({"rotary_cos": torch.ones(4, 8), "rotary_sin": torch.ones(4, 8)}, "rotary_cos has 4 rows"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_refused_before_the_cache_is_written(more, text):
    """What only attention finds wrong is found before new tokens are in the cache."""
    k_cache, v_cache = K.clone(), K.clone()
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    new = {"k": torch.ones(3, 2, 16), "v": torch.ones(3, 2, 16)}
    packed_cache(**caches, **{**NEW, **new})  # is a call that works
    assert not torch.equal(k_cache, K)
    k_cache.copy_(K)
    v_cache.copy_(K)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(text)):
        packed_cache(**caches, **{**NEW, **new, **more})
    assert torch.equal(k_cache, K)
    assert torch.equal(v_cache, K)


def test_an_out_that_does_not_fit():
    cache = K.clone()
    new = torch.ones(2, 1, 2, 16)
    with pytest.raises(ValueError, match="out must be"):
        torch.ops.flash_attn_3.fwd(
            Q, cache, cache.clone(), new, new, None, Q[:1], seqused_k=LENGTHS
        )
    assert torch.equal(cache, K)


@pytest.mark.skipif(FP8 is None, reason="a torch without fp8")
@pytest.mark.parametrize("name", ["q", "k", "v", "qv", "k_new"])
def test_fp8_is_refused_by_name(name):
    given = {"q": Q, "k": K, "v": K, name: (Q if name.startswith("q") else K).to(FP8)}
    with pytest.raises(NotImplementedError, match=rf"^{name} has dtype torch.float8_e4m3fn"):
        torch.ops.flash_attn_3.fwd(**{("q_v" if n == "qv" else n): x for n, x in given.items()})


def test_descales_of_one_change_nothing():
    ones = torch.ones(1).expand(2, 2)
    plain = dense()
    assert torch.equal(dense(q_descale=ones, k_descale=ones, v_descale=ones), plain)


def test_rows_without_keys_of_a_cache():
    out, lse, *_ = cache(cache_seqlens=ints(0, 2), causal=True, return_softmax_lse=True)
    assert (lse[0] == -INF).all()
    assert (lse[1, :, :4] == -INF).all()
    assert lse[1, :, 4:].isfinite().all()
    assert not out[0].any()
