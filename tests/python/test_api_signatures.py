"""Names and signatures are those of the FlashAttention-2 package.

``data/python_api.json`` maps each module's public names to their parameters, as written in ``def``;
null: a callable whose parameters are not fixed. A class has those of its ``__init__`` without self.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import flash_attn
import flash_attn_2_cuda
from flash_attn import __main__ as report
from flash_attn import _library, flash_attn_interface
from flash_attn.layers.patch_embed import PatchEmbed

API = json.loads((Path(__file__).parent / "data" / "python_api.json").read_text())
NAMES = [(module, name) for module, names in API.items() for name in names]

# Positional arguments of the extension module's functions; only num_splits may be left out.
EXTENSION_MODULE = {
    "fwd": 13,
    "varlen_fwd": 22,
    "bwd": 19,
    "varlen_bwd": 24,
    "fwd_kvcache": 20,
}
FORWARD_EXTENSIONS = ["s_aux", "attn_bias"]
BACKWARD_EXTENSIONS = ["dlse", "s_aux", "ds_aux", "attn_bias", "dattn_bias"]
SAMPLING_EXTENSIONS = [
    "min_p",
    "repetition_penalty",
    "generator",
    "lengths",
    "max_new_tokens",
    "pad_token_id",
]
EXTENSIONS = {  # keyword-only parameters that FlashAttention-2 does not have
    "flash_attn_func": FORWARD_EXTENSIONS,
    "flash_attn_kvpacked_func": FORWARD_EXTENSIONS,
    "flash_attn_qkvpacked_func": FORWARD_EXTENSIONS,
    "flash_attn_varlen_func": FORWARD_EXTENSIONS,
    "flash_attn_varlen_kvpacked_func": FORWARD_EXTENSIONS,
    "flash_attn_varlen_qkvpacked_func": FORWARD_EXTENSIONS,
    "flash_attn_with_kvcache": ["s_aux"],
    "_flash_attn_forward": FORWARD_EXTENSIONS,
    "_flash_attn_varlen_forward": FORWARD_EXTENSIONS,
    "_flash_attn_backward": BACKWARD_EXTENSIONS,
    "_flash_attn_varlen_backward": BACKWARD_EXTENSIONS,
    "Block": ["post_norm_cls"],
    "CrossAttention": ["window_size", "alibi_slopes", "softcap"],
    "CrossAttention.forward": ["s_aux"],
    "FlashCrossAttention": ["softcap"],
    "FlashCrossAttention.forward": ["s_aux"],
    "FlashSelfAttention": ["softcap"],
    "FlashSelfAttention.forward": ["s_aux"],
    "GPTLMHeadModel.forward": ["cu_seqlens", "max_seqlen"],
    "GPTModel.forward": ["cu_seqlens", "max_seqlen"],
    "MHA": ["head_options"],
    "ParallelMHA": ["head_options"],
    "SelfAttention": ["window_size", "alibi_slopes", "softcap"],
    "SelfAttention.forward": ["s_aux"],
    "decode": [*SAMPLING_EXTENSIONS, "streamer", "cache"],
    "decode_speculative": [*SAMPLING_EXTENSIONS, "output_scores"],
    "sample": ["min_p", "generator"],
    "sample_speculative": ["min_p", "generator"],
}
LOOSENED = {  # parameters that FlashAttention-2 gives no default
    "GenerationMixin.generate": {"max_length": None},  # max_new_tokens alone is enough
}
OPERATORS = (
    "_flash_attn_forward",
    "_flash_attn_varlen_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_backward",
)


def as_written(parameter):
    return parameter.name, parameter.kind, parameter.default


def expected_parameters(text):
    """The parameters of ``def f(<text>)``."""
    namespace = {"F": torch.nn.functional, "nn": torch.nn, "torch": torch, "PatchEmbed": PatchEmbed}
    exec(f"def f({text}): pass", namespace)  # the text is a file of this repository
    return [as_written(p) for p in inspect.signature(namespace["f"]).parameters.values()]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_signature(module, name):
    function = attrgetter(name)(importlib.import_module(module))
    assert callable(function)
    if API[module][name] is None:
        return
    expected = expected_parameters(API[module][name])
    names = [name for name, *_ in expected]
    parameters = inspect.signature(function).parameters.values()
    loosened = LOOSENED.get(name, {})
    assert all(default is inspect.Parameter.empty for n, _, default in expected if n in loosened)
    expected = [(n, kind, loosened.get(n, default)) for n, kind, default in expected]
    assert [as_written(p) for p in parameters if p.name in names] == expected
    extensions = [p for p in parameters if p.name not in names]
    assert [p.name for p in extensions] == EXTENSIONS.get(name, [])
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extensions)


def test_package_exports():
    assert flash_attn.__version__.startswith("2.8.3.post")
    names = [name for name in flash_attn.__all__ if name != "emulator"]
    assert len(names) == 7
    for name in names:
        assert getattr(flash_attn, name) is getattr(flash_attn_interface, name)


def test_subpackages_of_other_distributions(tmp_path):
    """A directory flash_attn elsewhere on sys.path adds its subpackages."""
    package = tmp_path / "flash_attn" / "of_another_distribution"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 42\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import flash_attn; "
        "from flash_attn.of_another_distribution import value; "
        "print(value, flash_attn.flash_attn_func.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "42 flash_attn_func\n"


@pytest.mark.parametrize(("name", "count"), EXTENSION_MODULE.items())
def test_extension_module(name, count):
    parameters = inspect.signature(getattr(flash_attn_2_cuda, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_ONLY for p in parameters)
    assert len(parameters) == count
    with_default = [p.name for p in parameters if p.default is not p.empty]
    assert with_default == (["num_splits"] if name == "varlen_fwd" else [])


def test_names_that_other_packages_import():
    assert flash_attn_interface.flash_attn_gpu is flash_attn_2_cuda
    assert flash_attn_interface.USE_TRITON_ROCM is False
    for name in OPERATORS:
        wrapped = getattr(flash_attn_interface, "_wrapped" + name)
        assert wrapped is getattr(torch.ops.flash_attn, name)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_schema(name):
    """An operator has the parameters, order and defaults of the function of its name."""
    arguments = getattr(torch.ops.flash_attn, name).default._schema.arguments
    parameters = list(inspect.signature(getattr(flash_attn_interface, name)).parameters.values())
    assert [a.name for a in arguments] == [p.name for p in parameters]
    for argument, parameter in zip(arguments, parameters):
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY)
        assert argument.has_default_value() == (parameter.default is not parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == parameter.default


@pytest.mark.parametrize(
    ("head_dim", "plain", "dropout"),
    [(32, 128, 128), (64, 128, 64), (96, 64, 64), (128, 64, 32), (192, 64, 64), (256, 64, 64)],
)
def test_block_size_n(head_dim, plain, dropout):
    cpu = torch.device("cpu")
    for causal in (False, True):
        assert flash_attn_interface._get_block_size_n(cpu, head_dim, False, causal) == plain
        assert flash_attn_interface._get_block_size_n(cpu, head_dim, True, causal) == dropout


def test_round_multiple():
    assert [flash_attn_interface.round_multiple(x, 128) for x in (0, 1, 128, 129)] == [
        0,
        128,
        128,
        256,
    ]


def test_maybe_contiguous_copies_only_for_the_last_stride():
    x = torch.randn(2, 3, 4)
    assert flash_attn_interface.maybe_contiguous(None) is None
    assert flash_attn_interface.maybe_contiguous(x) is x
    rows_strided = x.transpose(0, 1)
    assert flash_attn_interface.maybe_contiguous(rows_strided) is rows_strided
    columns_strided = x.transpose(1, 2)
    copy = flash_attn_interface.maybe_contiguous(columns_strided)
    assert copy.is_contiguous()
    assert torch.equal(copy, columns_strided)


def test_report(monkeypatch):
    """``python -m flash_attn`` names what is in use, and warns of two OpenMP runtimes."""
    lines = report.report().splitlines()
    assert not any(line.endswith(" ") for line in lines)
    items = dict(line.split(":", 1) for line in lines if not line.startswith(" "))
    items = {name: value.strip() for name, value in items.items()}
    assert items["flash_attn"].startswith(flash_attn.__version__)
    assert items["library"].startswith(str(_library.lib.version()))
    assert items["torch"].startswith(torch.__version__)
    assert items["instruction sets"].endswith(f"in use: {_library.cpu_isa()}")
    assert [line for line in lines if line.startswith("  cpu: ")] == [
        "  cpu: mha_fwd, mha_varlen_fwd, mha_fwd_kvcache (fp16,bf16,fp32,fp8; head dims 1-576)",
        "  cpu: mha_bwd, mha_varlen_bwd, combine (fp16,bf16,fp32; head dims 1-576)",
    ]
    assert "libgomp" in items["OpenMP"]

    two = ["/usr/lib/libgomp.so.1", "/opt/torch/lib/libgomp-0123abcd.so.1"]
    monkeypatch.setattr(report, "_mapped_openmp_libraries", lambda: two)
    assert "More than one OpenMP runtime" in report.report()


def test_report_of_kernels_alone(capsys):
    report.main(["--kernels"])
    assert capsys.readouterr().out.splitlines() == [
        "backend isa operation dtypes head_dims",
        *str(_library.lib.kernels()).splitlines(),
    ]


@pytest.mark.parametrize(
    ("argument", "status", "text"),
    [("--help", 0, "--kernels print every kernel instead"), ("--kernel-list", 2, "--kernel-list")],
)
def test_command_line_of_the_report(capsys, argument, status, text):
    with pytest.raises(SystemExit) as exit:
        report.main([argument])
    assert exit.value.code == status
    printed = "".join(capsys.readouterr())
    assert printed.startswith("usage: python -m flash_attn [-h] [--kernels]")
    assert text in re.sub(" +", " ", printed)
