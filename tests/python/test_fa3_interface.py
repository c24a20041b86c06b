"""FlashAttention-3's names, signatures, operators' schemas and refusals, and torch.compile."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import zipfile
from importlib import metadata

import pytest
import torch
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
    assert not any(flags.values())
    assert {"FLASHATTENTION_DISABLE_PAGEDKV", "FLASHATTENTION_DISABLE_FP8"} <= set(flags)


def test_the_distribution(tmp_path, monkeypatch):
    """Its wheel is named as clients ask: flash_attn_interface belongs to flash-attn-3."""
    build = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(ROOT / "hopper")
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(site)
    modules = {x.name for x in (ROOT / "hopper").iterdir()} - {"pyproject.toml", "__pycache__"}
    installed = {x.name for x in site.iterdir() if x.suffix != ".dist-info"}
    assert installed == modules
    monkeypatch.syspath_prepend(str(site))
    assert metadata.distribution("flash-attn-3").locate_file("") == site
    if sys.version_info >= (3, 11):  # earlier ones read a file that this wheel lacks
        found = metadata.packages_distributions()
        assert found["flash_attn_interface"] == found["flash_attn_3"] == ["flash-attn-3"]


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
