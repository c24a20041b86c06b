"""OpenVINO's ScaledDotProductAttention on its CPU plugin: a model of this one operation."""

from __future__ import annotations

import functools

import torch
from cases.case import Case, Inputs
from torch import Tensor

from peers.unsupported import Unsupported

INSTALL = "pip install openvino"


@functools.cache
def _openvino():
    try:
        import openvino
    except ImportError as error:
        raise Unsupported(f"not installed: {INSTALL}") from error
    return openvino


def version() -> str:
    """OpenVINO's version. Raises Unsupported where it is missing."""
    return _openvino().__version__.split("-")[0]


@functools.cache
def _core():
    return _openvino().Core()


def _element_type(dtype: str):
    types = _openvino().Type
    return {"float32": types.f32, "bfloat16": types.bf16, "float16": types.f16}[dtype]


def _shared(x: Tensor, dtype: str):
    """OpenVINO's view of a tensor; NumPy knows no bf16, so it passes as another 16-bit type."""
    openvino = _openvino()
    if x.dtype == torch.bfloat16:
        return openvino.Tensor(x.view(torch.int16).numpy(), list(x.shape), _element_type(dtype))
    return openvino.Tensor(x.numpy(), shared_memory=True)


def _compile(case: Case, shape: list[int]):
    openvino, element_type = _openvino(), _element_type(case.dtype)
    from openvino import opset13 as ops

    parameters = [ops.parameter(shape, element_type, name=name) for name in "qkv"]
    attention = ops.scaled_dot_product_attention(*parameters, causal=case.causal)
    model = openvino.Model([ops.result(attention)], parameters, "attention")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    if case.dtype == "float32":  # elsewhere it takes the best that the CPU has
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    return _core().compile_model(model, "CPU", settings)


def openvino(case: Case, inputs: Inputs):
    """Forward of equal head counts. Operands of 16 bits are computed as the plugin chooses."""
    if case.op != "fwd" or case.window or case.nheads != case.nheads_k:
        raise Unsupported("measured for forward with equal head counts")
    if case.headdim != case.headdim_v:
        raise Unsupported("measured for one head dim")
    _openvino()
    tensors = [x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v)]
    out = torch.empty_like(tensors[0])
    request = _compile(case, list(out.shape)).create_infer_request()
    for i, x in enumerate(tensors):
        request.set_input_tensor(i, _shared(x, case.dtype))
    request.set_output_tensor(0, _shared(out, case.dtype))

    def run(kept=tensors):
        request.infer()
        return (out.transpose(1, 2),)

    return run
