"""This package under other libraries' own switches.

- ``register()``: Hugging Face transformers, ``attn_implementation="exact_attention"``
  (``huggingface.py``).
- ``sdpa.register()``: ``torch.nn.functional.scaled_dot_product_attention`` on the CPU
  (``sdpa.py``).

``import flash_attn`` is enough to name both; what they need is imported when they are. Importing
this package imports neither of the other libraries.
"""

from __future__ import annotations

import importlib

__all__ = ["register"]


def __getattr__(name: str):
    """Import ``flash_attn.integrations.sdpa`` when it is first asked for."""
    if name == "sdpa":
        return importlib.import_module("flash_attn.integrations.sdpa")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(
    name: str = "exact_attention",
    *,
    flash_attention_2: bool = False,
    flash_attention_3: bool = False,
) -> str:
    """Make this package an attention implementation of Hugging Face transformers.

    Afterwards ``AutoModel.from_pretrained(..., attn_implementation=name)`` and
    ``model.set_attn_implementation(name)`` run on it, on the CPU as well. A model with layers that
    compute attention themselves, without transformers' attention interface, gets a warning that
    names them, and the right results. Calling it again is harmless.

    Arguments:
        name: what to call the implementation. It must not contain "flash": transformers takes every
            such name for one of its own and looks for it on the model hub.
        flash_attention_2: let transformers' own ``attn_implementation="flash_attention_2"`` run on
            the CPU, too, which it refuses without CUDA. It calls this package. Continuous batching
            and a few models' own layers (Falcon, GPT-J) know no other name.
        flash_attention_3: the same for ``"flash_attention_3"``; it needs the distribution
            flash-attn-3 (``hopper/`` of the sources).

    Returns:
        ``name``.

    Raises:
        ImportError: transformers is missing, or older than its version 5; or flash-attn-3 is.
        ValueError: ``name`` contains "flash".
    """
    from flash_attn.integrations import huggingface

    return huggingface.register(name, flash_attention_2, flash_attention_3)
