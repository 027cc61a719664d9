"""Checkpoints that are whole or not there: a temporary name, fsync, a rename; in directories, a manifest last."""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
"""Of a sharded checkpoint, the names and sizes of all other files; written last."""


def save_file(checkpoint: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to ``path``, which afterwards has either all of it or what it had before.

    Raises:
        OSError: The disk is full (the message has the bytes needed and free) or cannot be written to.
    """
    path = Path(path)
    with replacing(path, bytes_of(checkpoint)) as temporary, temporary.open("wb") as file:
        # A file, not a name: torch's own writer says nothing of why it failed.
        torch.save(checkpoint, file)


@contextmanager
def replacing(path: Path, needed_bytes: int) -> Iterator[Path]:
    """A name to write a file or directory at, in the folder of ``path``; moved to ``path`` if the block succeeds.

    Args:
        path: What is to be there, new or in place of an older one.
        needed_bytes: How much will be written, for the message when the disk is full.
    """
    temporary = temporary_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        with disk_full_said(path, needed_bytes, temporary):
            yield temporary
            commit(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def temporary_of(path: Path) -> Path:
    """Where ``path`` is written before it is whole: always the same name, so that a killed run leaves one at most."""
    return path.with_name(f".{path.name}.saving")


@contextmanager
def disk_full_said(path: Path, needed_bytes: int, temporary: Path) -> Iterator[None]:
    """Let a full disk fail with the path, the bytes needed and the bytes free without what was written so far."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        remove(temporary)
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            errno.ENOSPC,
            f"The disk is full: `{path}` needs {needed_bytes:,} bytes and {free:,} are free there. Nothing is left "
            "of it and older checkpoints are whole; make room, or save elsewhere or less (`save_weights_only=True`)",
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a used-up quota, is what is behind ``error``."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def commit(temporary: Path, path: Path) -> None:
    """Make what lies at ``temporary`` durable, give a directory its manifest, and rename it to ``path``."""
    if temporary.is_dir():
        files = sorted(file for file in temporary.rglob("*") if file.is_file() and file.name != MANIFEST)
        for file in files:
            _sync(file)
        sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in files}
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({"format": 1, "files": sizes}, indent=1))
        _sync(manifest)
    _sync(temporary)
    previous = path.with_name(f".{path.name}.previous")
    if path.is_dir() and not path.is_symlink():
        # Directories cannot be replaced in one step. In between, the older one is there under this name.
        remove(previous)
        path.rename(previous)
        temporary.rename(path)
        remove(previous)
    else:
        if temporary.is_dir() and path.exists():
            path.unlink()
        temporary.replace(path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove the file, link or directory at ``path``, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether the checkpoint at ``path`` was written to its end: a file's index or a directory's sizes are right."""
    path = Path(path)
    if not path.is_dir():
        return path.is_file() and zipfile.is_zipfile(path)  # the index is at the end of the file
    try:
        sizes: Mapping[str, int] = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def latest_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in ``directory``, to give as ``ckpt_path``; ``None`` where there is none.

    Args:
        directory: Where a ``ModelCheckpoint`` saves: files that end in ``.ckpt``, and sharded directories. What a
            killed run left half-written is passed over.

    Example:
        >>> latest_checkpoint("/nowhere") is None
        True
    """
    folder = Path(directory)
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".ckpt"]
    ages = {path: _written_at(path) for path in found if not path.name.endswith(".saving") and is_whole(path)}
    return str(max(ages, key=lambda path: (ages[path], path.name))) if ages else None


def bytes_of(value: Any) -> int:
    """The bytes of the tensors in ``value``, nested as it may be, storage shared by several counted once."""
    storages: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            storage = part.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(part, Mapping):
            for inner in part.values():
                visit(inner)
        elif isinstance(part, list | tuple):
            for inner in part:
                visit(inner)

    visit(value)
    return sum(storages.values())


def _written_at(path: Path) -> int:
    return (path / MANIFEST if path.is_dir() else path).stat().st_mtime_ns


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
