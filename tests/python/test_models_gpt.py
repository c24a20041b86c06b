from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpt_cases import LLAMA, config

from flash_attn.models.gpt import GPTLMHeadModel

CASES = {
    "gpt2": {},
    "llama": LLAMA,
    "parallel": {**LLAMA, "parallel_block": True},
    "fused": {**LLAMA, "fused_dropout_add_ln": True},
    "fusedpar": {
        **LLAMA,
        "parallel_block": True,
        "fused_dropout_add_ln": True,
        "residual_in_fp32": True,
    },
    "sand": {
        **LLAMA,
        "sandwich_norm": True,
        "rms_norm_zero_centered": True,
        "qk_norm": True,
        "attn_sinks": True,
        "attn_softcap": 5.0,
        "final_logit_softcap": 3.0,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "rotary_emb_local_base": 100.0,
        "rotary_emb_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "post": {"prenorm": False, "word_embed_proj_dim": 16, "position_embeddings_offset": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_cache(case):
    torch.manual_seed(0)
    model = GPTLMHeadModel(config(**CASES[case])).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    ids = torch.randint(0, 97, (2, 12))
    whole = model(ids).logits
    whole.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    params = SimpleNamespace(
        max_seqlen=12,
        max_batch_size=2,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict={},
        lengths_per_sample=None,
    )
    outs = []
    with torch.inference_mode():
        for a, b in ((0, 5), *((i, i + 1) for i in range(5, 12))):
            outs.append(model(ids[:, a:b], inference_params=params).logits)
            params.seqlen_offset = b
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-4)
