"""What transformers asks its models before it uses an attention implementation.

Most models call the registered attention function. Some compute attention themselves, and some of
these look their layers up in a table by the implementation's name. ``use_eager_layers`` lets both
kinds run on their eager layers, and says so. ``allow_flash_attention`` opens transformers' own
``"flash_attention_2"`` or ``"flash_attention_3"``, which call this package, on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import warnings
from types import ModuleType
from typing import Any, Callable

__all__ = ["allow_flash_attention", "use_eager_layers"]

_ATTENTION_CLASS = re.compile(
    r"^class (\w*Attention\w*)\((?:nn|torch\.nn)\.Module\):", re.MULTILINE
)
_OWN_SOFTMAX = re.compile(r"softmax\(", re.IGNORECASE)


def _replace_method(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Put make(method) in the place of a method, once."""
    method = getattr(owner, name)
    if getattr(method, "_from_flash_attn", False):
        return
    replacement = functools.wraps(method)(make(method))
    replacement._from_flash_attn = True
    setattr(owner, name, replacement)


# ------------------------------------------------------------------------------------------------
# Models that compute attention themselves


def _class_bodies(source: str) -> dict[str, str]:
    """Names and source of a module's attention layers."""
    starts = list(_ATTENTION_CLASS.finditer(source))
    bodies = {}
    for match in starts:
        end = re.compile(r"^(?:class|def|@)", re.MULTILINE).search(source, match.end())
        bodies[match[1]] = source[match.start() : end.start() if end else len(source)]
    return bodies


@functools.cache
def own_attention_layers(module: ModuleType) -> tuple[str, ...]:
    """Names of a module's layers that compute attention without transformers' interface."""
    import inspect

    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return ()
    return tuple(
        name
        for name, body in _class_bodies(source).items()
        if _OWN_SOFTMAX.search(body) and "ALL_ATTENTION_FUNCTIONS" not in body
    )


def _modules_of(model_class: type, base: type) -> list[ModuleType]:
    """Modules that define a model class and those that it extends."""
    classes = [c for c in model_class.__mro__ if issubclass(c, base) and c is not base]
    names = dict.fromkeys(c.__module__ for c in classes)
    return [sys.modules[name] for name in names if name in sys.modules]


def _add_to_tables(module: ModuleType, implementation: str) -> None:
    """Give an implementation the eager layers in a module's tables of attention classes."""
    for name, table in vars(module).items():
        if name.endswith("_ATTENTION_CLASSES") and isinstance(table, dict) and "eager" in table:
            table.setdefault(implementation, table["eager"])


def _prepare(model_class: type, base: type, implementation: str) -> None:
    for module in _modules_of(model_class, base):
        _add_to_tables(module, implementation)
        layers = own_attention_layers(module)
        if layers:
            warnings.warn(
                f"{', '.join(layers)} of {module.__name__} compute attention without transformers' "
                f"attention interface: with attn_implementation={implementation!r} they run as "
                "with 'eager', and flash_attn computes the other layers only"
            )


_registered_names: set[str] = set()


def use_eager_layers(implementation: str) -> None:
    """Let models with attention of their own be loaded under ``implementation``, with a warning."""
    from transformers import PreTrainedModel

    def make(method: Callable) -> Callable:
        def get_correct_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
            chosen = method(self, *args, **kwargs)
            if chosen in _registered_names:
                _prepare(type(self), PreTrainedModel, chosen)
            return chosen

        return get_correct_attn_implementation

    _registered_names.add(implementation)
    _replace_method(PreTrainedModel, "get_correct_attn_implementation", make)


# ------------------------------------------------------------------------------------------------
# transformers' own "flash_attention_2" and "flash_attention_3"

_allowed: set[int] = set()  # versions


def _is_flash_attn_2_available(kernels_fallback_ok: bool = False) -> bool:
    return True


def _is_flash_attn_3_available(kernels_fallback_ok: bool = False) -> bool:
    return True


_AVAILABILITY = {2: _is_flash_attn_2_available, 3: _is_flash_attn_3_available}


def _is_flash_attn_greater_or_equal(library_version: str) -> bool:
    from packaging import version

    import flash_attn

    return version.parse(flash_attn.__version__) >= version.parse(library_version)


def _replace_everywhere(name: str, function: Callable) -> None:
    """Replace a function of transformers in every module that has imported it."""
    from transformers.utils import import_utils

    function.__name__ = name
    function._dynamo_marked_constant = True  # as the function that it replaces
    original = getattr(import_utils, name)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.") and vars(module).get(name) is original:
            setattr(module, name, function)


def _complete_imported_models() -> None:
    """Give models that were imported before the function that they import if there is a flash-attn.

    Falcon, GPT-J, GPT-Neo and Bark ask while they are imported.
    """
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and "is_flash_attn_available" in vars(module):
            vars(module).setdefault("_flash_attention_forward", _flash_attention_forward)


def _refuse_ignored_windows(model: Any, version: int) -> None:
    """Raise ValueError for GPT-Neo: transformers forgets the window in its flash layers."""
    if "local" in (getattr(model.config, "attention_layers", None) or ()):
        raise ValueError(
            f"the local layers of {type(model).__name__} lose their window under transformers' "
            f'own "flash_attention_{version}": load the model with attn_implementation="eager"'
        )


def allow_flash_attention(version: int) -> None:
    """Let ``attn_implementation="flash_attention_<version>"`` run on the CPU, in fp32 as well.

    Raises ImportError for version 3 without the module that transformers imports.
    """
    if version == 3 and importlib.util.find_spec("flash_attn_interface") is None:
        raise ImportError(
            'transformers\' "flash_attention_3" imports flash_attn_interface, which the '
            "distribution flash-attn-3 has: pip install ./hopper, in flash_attn's sources"
        )
    from transformers import PreTrainedModel, modeling_flash_attention_utils

    def make(method: Callable) -> Callable:
        def _flash_attn_can_dispatch(
            self, flash_attn_version: int, *args: Any, **kwargs: Any
        ) -> bool:
            # Past these two checks the method looks for a GPU and for half precision.
            if flash_attn_version not in _allowed or not self._supports_flash_attn:
                return method(self, flash_attn_version, *args, **kwargs)
            _refuse_ignored_windows(self, flash_attn_version)
            return True

        return _flash_attn_can_dispatch

    _allowed.add(version)
    is_available = _AVAILABILITY[version]
    matrix = modeling_flash_attention_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    matrix[version]["general_availability_check"] = is_available
    _replace_everywhere(f"is_flash_attn_{version}_available", is_available)
    _replace_everywhere("is_flash_attn_greater_or_equal", _is_flash_attn_greater_or_equal)
    _replace_method(PreTrainedModel, "_flash_attn_can_dispatch", make)
    _complete_imported_models()
