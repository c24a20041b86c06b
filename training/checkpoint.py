"""Checkpoints by torch.distributed.checkpoint: whole or not there, checked before they are read.

A checkpoint is written to ``step-N.partial`` and renamed to ``step-N`` when its last byte is on the
disk, so that neither a kill nor a full disk harms the one before. Its manifest.json has the size
and CRC-32 of each file.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

_FORMAT = 1
_MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_DCP_METADATA = ".metadata"
_READ_BYTES = 1 << 24


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or could not be written; the sentence names it."""


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            crc = zlib.crc32(data, crc)
    return crc


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict:
    """Return a checkpoint's manifest. Raises CheckpointError without one of this format."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        known = manifest["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is no whole checkpoint: its {_MANIFEST} cannot be read "
            f"({type(error).__name__}: {error})"
        ) from None
    if not known:
        raise CheckpointError(f"{folder} has format {manifest['format']}; this is {_FORMAT}")
    for name, holds in _FACTS.items():
        if not holds(manifest.get(name)):
            got = f"{manifest[name]!r:.80}" if name in manifest else "nothing"
            raise CheckpointError(f"{folder / _MANIFEST} is damaged: it has {got} as {name!r}")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_files(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _DCP_METADATA in value
        and all(
            isinstance(facts, list) and len(facts) == 2 and all(map(_is_count, facts))
            for facts in value.values()
        )
    )


# What the manifest of a run's checkpoint has beside its format.
_FACTS = {
    "step": _is_count,
    "processes": lambda value: _is_count(value) and value > 0,
    "settings": lambda value: isinstance(value, dict),
    "course": lambda value: isinstance(value, dict),
    "files": _is_files,
}


def _damage(folder: Path, files: list[tuple[str, list[int]]]) -> str | None:
    """Return what is wrong with the first damaged file, or None."""
    for name, (size, crc) in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes where {size} were written"
        if _crc(path) != crc:
            return f"{name} does not have the content that was written"
    return None


def _first(finding: str | None) -> str | None:
    """Return the first process's finding that is not None, on all processes."""
    findings = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    return next((f for f in findings if f is not None), None)


def verify(folder: Path) -> dict:
    """Return the manifest of a checkpoint that is whole; each process reads its part of the files.

    Raises CheckpointError, on all processes, naming the damage and the checkpoint before it.
    """
    manifest, damage = {}, None
    try:
        manifest = read_manifest(folder)
        files = sorted(manifest["files"].items())
        unknown = {path.name for path in folder.glob("*.distcp")} - manifest["files"].keys()
        damage = (
            f"{min(unknown)} is not in its {_MANIFEST}"
            if unknown
            else _damage(folder, files[dist.get_rank() :: dist.get_world_size()])
        )
    except CheckpointError as error:
        damage = str(error)
    if (damage := _first(damage)) is not None:
        earlier = [path for path in whole_checkpoints(folder.parent) if path.name < folder.name]
        advice = f"; the one before it is {earlier[-1]} (trainer.resume)" if earlier else ""
        raise CheckpointError(f"the checkpoint {folder} is damaged: {damage}{advice}")
    return manifest


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that were written to their end, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a folder."""
    return next(reversed(whole_checkpoints(folder)), None)


class Checkpoints:
    """The checkpoints of a run, of which the last ``keep`` stay.

    asynchronous: a state is copied, then written while training goes on; what went wrong with it
        is raised by the next ``save`` or ``wait``.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool):
        self._folder, self._keep, self._asynchronous = folder, keep, asynchronous
        # Training's collectives must not mix with those of the thread that writes.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[Path, Future] | None = None
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"step-*{_PARTIAL}"):  # by a run that was killed
                shutil.rmtree(left)
        dist.barrier()

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint."""
        return newest_checkpoint(self._folder)

    def set_aside_after(self, checkpoint: Path | None) -> None:
        """Rename the checkpoints after the one that a run goes on from, or all: they are of another
        course."""
        if dist.get_rank() == 0:
            is_own = checkpoint and checkpoint.parent.resolve() == self._folder.resolve()
            for path in whole_checkpoints(self._folder):
                if not is_own or path.name > checkpoint.name:
                    path.rename(path.with_name(f"{path.name}.aside-{time.time_ns()}"))
        dist.barrier()

    def save(self, step: int, state: dict[str, Any], facts: dict) -> None:
        """Store a state of DCP, and facts (for JSON) in the manifest."""
        self.wait()
        final = self._folder / f"step-{step:08d}"
        partial = final.with_name(final.name + _PARTIAL)
        writer = dcp.FileSystemWriter(partial, sync_files=True)
        if self._asynchronous:
            written = dcp.async_save(state, storage_writer=writer, process_group=self._group)
            finished = self._thread.submit(self._finish, written, final, partial, facts)
        else:
            written = Future()
            finished = Future()
            try:
                written.set_result(
                    dcp.save(state, storage_writer=writer, process_group=self._group)
                )
                finished.set_result(self._finish(written, final, partial, facts))
            except BaseException as error:
                finished.set_exception(error)
        self._pending = (final, finished)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when the last ``save`` is on the disk. Raises CheckpointError if it failed."""
        if self._pending is None:
            return
        (final, finished), self._pending = self._pending, None
        error = finished.exception()
        problem = _first(None if error is None else _reason(error))
        if problem is None:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(final.with_name(final.name + _PARTIAL), ignore_errors=True)
        newest = self.newest()
        raise CheckpointError(
            f"the checkpoint {final} could not be written: {problem}; the last whole one is "
            f"{newest or 'none'}"
        )

    def _finish(self, written: Future, final: Path, partial: Path, facts: dict) -> None:
        """Give a checkpoint its name once all processes have written it."""
        written.result()
        if dist.get_rank() != 0:
            return
        files = {
            path.name: [path.stat().st_size, _crc(path)]
            for path in sorted(partial.iterdir())
            if path.is_file()
        }
        with (partial / _MANIFEST).open("w") as file:
            json.dump({"format": _FORMAT, **facts, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        partial.rename(final)
        _sync_folder(final.parent)
        for old in whole_checkpoints(self._folder)[: -self._keep]:
            self._remove(old)

    @staticmethod
    def _remove(folder: Path) -> None:
        gone = folder.with_name(f"{folder.name}.old{_PARTIAL}")  # at no time a damaged one
        folder.rename(gone)
        shutil.rmtree(gone)


def _reason(error: BaseException) -> str:
    """Return the first cause of DCP's exception of several processes, or of another."""
    causes = getattr(error, "failures", None)
    if causes:
        error = next(iter(causes.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
