"""llama.cpp's attention: ggml_flash_attn_ext, by way of the ggml-python package."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from types import ModuleType

import torch
from cases.case import Case, Inputs
from torch import Tensor

from peers.unsupported import Unsupported

INSTALL = "pip install ggml-python (compiles ggml, two minutes)"
_ROWS_FIRST = (3, 1, 2, 0)  # ggml's dimensions, fastest first, of a (batch, seqlen, nheads, d) one


@functools.cache
def _ggml() -> ModuleType:
    try:
        import ggml
    except (ImportError, OSError) as error:
        raise Unsupported(f"not installed: {INSTALL}") from error
    return ggml


def version() -> str:
    """ggml-python's version. Raises Unsupported where it is missing."""
    _ggml()
    return importlib.metadata.version("ggml-python")


class _Graph:
    """A graph of one attention over the memory of torch's tensors."""

    def __init__(self, ggml: ModuleType, threads: int):
        self._ggml, self._threads = ggml, threads
        parameters = ggml.ggml_init_params(mem_size=1 << 20, mem_buffer=None, no_alloc=True)
        self._context = ggml.ggml_init(parameters)
        self._kept: list[Tensor] = []

    def __del__(self):
        self._ggml.ggml_free(self._context)

    def tensor(self, x: Tensor, dims: tuple[int, ...] = _ROWS_FIRST):
        """ggml's view of x; dims: which of x's dimensions is ggml's first, second, ..."""
        ggml = self._ggml
        types = {
            torch.float32: ggml.GGML_TYPE_F32,
            torch.float16: ggml.GGML_TYPE_F16,
            torch.bfloat16: ggml.GGML_TYPE_BF16,
        }
        view = ggml.ggml_new_tensor_4d(self._context, types[x.dtype], *(x.shape[i] for i in dims))
        view.contents.data = x.data_ptr()
        for place, i in enumerate(dims):
            view.contents.nb[place] = x.stride(i) * x.element_size()
        self._kept.append(x)
        return view

    def attention(self, q, k, v, mask, scale: float, out: Tensor) -> None:
        """Let ``run`` compute attention into out."""
        ggml = self._ggml
        node = ggml.ggml_flash_attn_ext(self._context, q, k, v, mask, scale, 0.0, 0.0)
        node.contents.data = out.data_ptr()
        self._graph = ggml.ggml_new_graph(self._context)
        ggml.ggml_build_forward_expand(self._graph, node)
        self._plan = ggml.ggml_graph_plan(self._graph, self._threads, None)
        scratch = torch.empty(max(self._plan.work_size, 1), dtype=torch.uint8)
        self._plan.work_data = ctypes.cast(scratch.data_ptr(), type(self._plan.work_data))
        self._kept += [out, scratch]

    def run(self) -> None:
        if self._ggml.ggml_graph_compute(self._graph, ctypes.byref(self._plan)):
            raise RuntimeError("ggml_graph_compute failed")


def ggml(case: Case, inputs: Inputs):
    """Forward and decode. Queries and the result are fp32, as llama.cpp has them."""
    if case.op not in ("fwd", "decode") or case.window:
        raise Unsupported("measured for forward and decode")
    if case.page_size:
        raise Unsupported("has no pages")
    graph = _Graph(_ggml(), torch.get_num_threads())
    out = torch.empty(inputs.dout.shape)
    mask = None
    if case.is_masked:
        hidden = torch.full((1, 1, case.seqlen_q, case.seqlen_k), -torch.inf).triu_(1).half()
        mask = graph.tensor(hidden, (3, 2, 1, 0))
    q, k, v = (graph.tensor(x) for x in (inputs.q.float(), inputs.k, inputs.v))
    graph.attention(q, k, v, mask, case.headdim**-0.5, out)

    def run():
        graph.run()
        return (out,)

    return run
