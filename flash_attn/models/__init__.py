"""Models of the attention and modules of this package, and conversion of their weights."""

from importlib import import_module

__all__ = ["from_hf", "to_hf"]

_MODULES = {"from_hf": "_hf", "to_hf": "_hf_save"}


def __getattr__(name: str):  # so that no model is imported that is not used
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
