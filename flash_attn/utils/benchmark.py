"""Timing, profiling and memory measurement of a function of tensors, on the CPU or a GPU."""

from __future__ import annotations

import gc

import torch
import torch.utils.benchmark as torch_benchmark

__all__ = [
    "benchmark_all",
    "benchmark_backward",
    "benchmark_combined",
    "benchmark_forward",
    "benchmark_fwd_bwd",
    "benchmark_memory",
    "pytorch_profiler",
]


def _device_type(inputs) -> str:
    """Device type of the first tensor among ``inputs``; "cpu" if there is none."""
    return next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")


def _call(fn, inputs, kwinputs, amp: bool, amp_dtype: torch.dtype) -> torch.Tensor:
    """``fn``'s result, or the first one if it returns several."""
    with torch.autocast(device_type=_device_type(inputs), dtype=amp_dtype, enabled=amp):
        result = fn(*inputs, **kwinputs)
    return result[0] if isinstance(result, tuple) else result


def _clear_grads(inputs) -> None:
    for x in inputs:
        if isinstance(x, torch.Tensor):
            x.grad = None


def _upstream_grad(output: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    if grad is None:
        return torch.randn_like(output)
    if grad.shape != output.shape:
        raise RuntimeError(f"grad has shape {tuple(grad.shape)}, output {tuple(output.shape)}")
    return grad


def _measure(statement, repeats: int, title: str, verbose: bool):
    """Time a function of no arguments with torch's own number of threads."""
    timer = torch_benchmark.Timer(
        stmt="statement()",
        globals={"statement": statement},
        num_threads=torch.get_num_threads(),
    )
    measurement = timer.timeit(repeats)
    if verbose:
        print(title)
        print(measurement)
    return timer, measurement


def benchmark_forward(
    fn,
    *inputs,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
):
    """Time ``fn(*inputs, **kwinputs)``.

    Args:
        fn: the function.
        *inputs: its positional arguments. The first tensor among them says which device to run
            autocast for.
        repeats: number of timed calls.
        desc: name to print.
        verbose: print the measurement.
        amp: run under autocast.
        amp_dtype: dtype of autocast.
        **kwinputs: its keyword arguments.

    Returns:
        ``(timer, measurement)`` of ``torch.utils.benchmark``; ``measurement.mean`` is in seconds.
    """

    def forward():
        _call(fn, inputs, kwinputs, amp, amp_dtype)

    return _measure(forward, repeats, f"{desc} - Forward pass", verbose)


def benchmark_backward(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
):
    """Time the backward pass of ``fn(*inputs, **kwinputs)`` alone.

    Args:
        grad: gradient of the output (of the first output if there are several), same shape; None:
            random.

    The other arguments and the result are those of :func:`benchmark_forward`. Raises RuntimeError
    when ``grad`` does not have the output's shape.
    """
    output = _call(fn, inputs, kwinputs, amp, amp_dtype)
    output_grad = _upstream_grad(output, grad)

    def backward():
        _clear_grads(inputs)  # otherwise the time of adding to them is measured too
        output.backward(output_grad, retain_graph=True)

    return _measure(backward, repeats, f"{desc} - Backward pass", verbose)


def benchmark_combined(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
):
    """Time forward and backward pass of ``fn(*inputs, **kwinputs)`` together.

    Arguments and result are those of :func:`benchmark_backward`.
    """
    output_grad = _upstream_grad(_call(fn, inputs, kwinputs, amp, amp_dtype), grad)

    def forward_backward():
        _clear_grads(inputs)
        _call(fn, inputs, kwinputs, amp, amp_dtype).backward(output_grad)

    return _measure(forward_backward, repeats, f"{desc} - Forward + backward pass", verbose)


def benchmark_fwd_bwd(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
):
    """Time forward pass and backward pass of ``fn(*inputs, **kwinputs)`` one after the other.

    Arguments are those of :func:`benchmark_backward`.

    Returns:
        The results of :func:`benchmark_forward` and :func:`benchmark_backward`.
    """
    options = {
        "repeats": repeats,
        "desc": desc,
        "verbose": verbose,
        "amp": amp,
        "amp_dtype": amp_dtype,
    }
    return (
        benchmark_forward(fn, *inputs, **options, **kwinputs),
        benchmark_backward(fn, *inputs, grad=grad, **options, **kwinputs),
    )


def benchmark_all(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
):
    """Time forward pass, backward pass and both together.

    Arguments are those of :func:`benchmark_backward`.

    Returns:
        The results of :func:`benchmark_forward`, :func:`benchmark_backward` and
        :func:`benchmark_combined`.
    """
    options = {
        "repeats": repeats,
        "desc": desc,
        "verbose": verbose,
        "amp": amp,
        "amp_dtype": amp_dtype,
    }
    return (
        benchmark_forward(fn, *inputs, **options, **kwinputs),
        benchmark_backward(fn, *inputs, grad=grad, **options, **kwinputs),
        benchmark_combined(fn, *inputs, grad=grad, **options, **kwinputs),
    )


def pytorch_profiler(
    fn,
    *inputs,
    trace_filename=None,
    backward=False,
    amp=False,
    amp_dtype=torch.float16,
    cpu=False,
    verbose=True,
    **kwinputs,
):
    """Profile ``fn(*inputs, **kwinputs)`` with PyTorch's profiler, after 30 calls of warm-up.

    Args:
        trace_filename: where to write a Chrome trace; None: nowhere.
        backward: profile the backward pass too.
        amp: run under autocast.
        amp_dtype: dtype of autocast.
        cpu: record CPU activity. Always on when no GPU is available.
        verbose: print the table of operators.
    """
    output_grad = _upstream_grad(_call(fn, inputs, kwinputs, amp, amp_dtype), None)

    def run():
        _clear_grads(inputs)
        output = _call(fn, inputs, kwinputs, amp, amp_dtype)
        if backward:
            output.backward(output_grad)

    for _ in range(30):
        run()
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    if cpu or not on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CPU)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    if verbose:
        print(profiler.key_averages().table(row_limit=50))
    if trace_filename is not None:
        profiler.export_chrome_trace(trace_filename)


def benchmark_memory(fn, *inputs, desc="", verbose=True, **kwinputs):
    """Peak GPU memory of ``fn(*inputs, **kwinputs)``, in GB (10**9 bytes), what was in use before
    included.

    Raises RuntimeError when there is no GPU: PyTorch keeps no such count for the CPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("benchmark_memory needs a CUDA device")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize()
    gigabytes = torch.cuda.max_memory_allocated() / 1e9
    if verbose:
        print(f"{desc} max memory: {gigabytes}GB")
    torch.cuda.empty_cache()
    return gigabytes
