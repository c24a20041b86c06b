"""State dicts from checkpoints as Hugging Face's libraries write them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor

__all__ = ["state_dict_from_pretrained"]

# In this order, the first that a folder has.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _from_hub(model_name: str) -> Path:
    """Return the file of a model of Hugging Face's hub, or of its cache on this machine."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ImportError:
        raise FileNotFoundError(
            f"{model_name} is not a local folder or file, and huggingface_hub is not installed"
        ) from None
    try:
        for name in _FILES:
            try:
                path = Path(hf_hub_download(model_name, name))
            except EntryNotFoundError:
                continue
            for shard in sorted(set(_weight_map(path).values())) if path.suffix == ".json" else ():
                hf_hub_download(model_name, shard)
            return path
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{model_name} is not a local folder or file, and not on the hub: {error}"
        ) from error
    raise FileNotFoundError(
        f"{model_name} is not a local folder or file, and the hub has none of {', '.join(_FILES)}"
    )


def _checkpoint(model_name: Union[str, Path]) -> Path:
    """Return the checkpoint's file, or the index of its files."""
    path = Path(model_name)
    if path.is_file():
        return path
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path} has none of {', '.join(_FILES)}")
    is_name = len(path.parts) <= 2 and not path.is_absolute() and path.parts[:1] != ("..",)
    if not is_name:
        raise FileNotFoundError(f"{model_name} is not a local folder or file")
    return _from_hub(str(model_name))


def _weight_map(index: Path) -> dict[str, str]:
    """Return from each tensor's name to its file, as an index says.

    Raises:
        ValueError: the file is no such index.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            return weight_map
        reason = "weight_map names files outside its folder"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{index} is not an index of a checkpoint ({reason})")


def _names_of_shard(path: Path) -> Optional[set[str]]:
    """Return the names in a safetensors file, whose length is checked, too; None: another one."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _loaded(path: Path, device) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device=str(device or "cpu"))
    # Only a zip can be mapped into memory; files of before torch 1.6 are none.
    mmap = zipfile.is_zipfile(path)
    return torch.load(path, map_location=device or "cpu", weights_only=True, mmap=mmap)


def _read(path: Path, function, *args):
    """Call ``function(path, *args)``; what fails says which file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return function(path, *args)
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors: {error}") from error
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is not a whole checkpoint ({type(error).__name__}: {reason})"
        ) from error


def _check_names(path: Path, awaited: set[str], names: set[str]) -> None:
    missing = sorted(awaited - names)
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}, which the checkpoint's index says it has")


def _load_shards(index: Path, device) -> dict[str, Tensor]:
    """Load all files of an index, those of safetensors after all were looked at."""
    shards: dict[Path, set[str]] = {}
    for name, file in _weight_map(index).items():
        shards.setdefault(index.parent / file, set()).add(name)
    for path, awaited in shards.items():
        names = _read(path, _names_of_shard)
        if names is not None:
            _check_names(path, awaited, names)
    state_dict = {}
    for path, awaited in shards.items():
        shard = _read(path, _loaded, device)
        _check_names(path, awaited, set(shard))
        state_dict.update(shard)
    return state_dict


def state_dict_from_pretrained(
    model_name: Union[str, Path],
    device: Optional[Union[str, torch.device]] = None,
    dtype: Optional[torch.dtype] = None,
) -> dict[str, Tensor]:
    """Load a checkpoint: safetensors or .bin, in one file or in several with an index.

    Files are mapped into memory rather than read, and hold tensors alone: no code is run.

    Args:
        model_name: a local folder or file, or a model's name on Hugging Face's hub, which needs the
            package ``huggingface_hub``.
        device: of the tensors; None: the CPU.
        dtype: that floating-point tensors are cast to; None: they stay as they are.

    Returns:
        From names to tensors, which may share the file's memory: copy before writing to them.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a file of its index is missing.
        ValueError: a file is truncated, corrupt, or lacks what the index says it has.
        ImportError: a safetensors file without the package.
    """
    path = _checkpoint(model_name)
    # A cast on the CPU needs no memory of the device for both.
    first = device if dtype in (None, torch.float32) else None
    if path.suffix == ".json":
        state_dict = _load_shards(path, first)
    else:
        state_dict = _read(path, _loaded, first)
    if not isinstance(state_dict, dict) or not all(
        isinstance(x, Tensor) for x in state_dict.values()
    ):
        raise ValueError(f"{path} is not a whole checkpoint (it holds other things than tensors)")

    def placed(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    return {name: placed(x) for name, x in state_dict.items()}
