"""One launch of every CUDA kernel on a small problem, for the sanitizers and the profiler."""

import torch

from flash_attn import flash_attn_func

for dtype in (torch.float16, torch.bfloat16):
    for headdim in (64, 128):
        for causal in (False, True):
            shape = (1, 300, 2, headdim)
            q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
            flash_attn_func(q, k, v, causal=causal)
torch.cuda.synchronize()
