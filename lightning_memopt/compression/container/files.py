"""The folder: one file of tensors, and a manifest with the size and checksum of it."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_memopt.compression.container.errors import CompressedFileError

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
LARGEST_HEADER = 100 * 2**20
"""Bytes of JSON that are read into memory at most: of the manifest, and of the header of the tensors."""


def write_folder(path: Path, manifest: dict[str, Any], data: dict[str, Tensor]) -> None:
    """Write the tensors, then the manifest, in a folder beside ``path`` that takes its place when it is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = path.resolve()  # a link to a folder stays, and leads to the new one
    temporary, replaced = path.with_name(f".{path.name}.saving"), path.with_name(f".{path.name}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(data, temporary / WEIGHTS)
        manifest = {"format": FORMAT, **manifest, "files": {WEIGHTS: _describe(temporary / WEIGHTS)}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":"), allow_nan=False))
        if path.is_dir():
            check_replaceable(path)
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(path, replaced)  # and removed afterwards, which may end in its midst
        os.replace(temporary, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        if replaced.is_dir() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # of a disk that is full
            raise OSError(f"`{path}` cannot be written: {error}") from error
        raise


def check_replaceable(folder: Path) -> None:
    """Raise where removing ``folder`` would lose something else than a compressed module.

    Raises:
        ValueError: It holds another file, or a manifest that is not ours, or is where the process works.
    """
    held = sorted(file.name for file in folder.iterdir())
    other = [name for name in held if name not in (MANIFEST, WEIGHTS)]
    if not other and held and not _has_our_manifest(folder):
        other = held
    if other:
        raise ValueError(
            f"`{folder}` holds something else than a compressed module, which would be lost: {', '.join(other[:5])}. "
            "Name another folder."
        )
    if folder == Path.cwd():
        raise ValueError(f"`{folder}` is the working directory, which cannot be replaced. Name another folder.")


def _has_our_manifest(folder: Path) -> bool:
    try:
        manifest = _read_json(folder / MANIFEST)
    except (CompressedFileError, OSError):
        return False
    files, versions = manifest.get("files"), manifest.get("versions")  # of any format, so that a newer one is too
    if not isinstance(files, dict) or not isinstance(versions, dict):
        return False
    return WEIGHTS in files and "lightning_memopt" in versions


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of ``path``, their sizes and checksums verified first.

    Raises:
        CompressedFileError: A file is missing, damaged, oversized, of another version, or outside.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = _read_manifest(path)
    files = _mapping(manifest, "files", path)
    if set(files) != {WEIGHTS}:
        raise CompressedFileError(
            f"`{path / MANIFEST}` names the files {sorted(map(str, files))}; a "
            f"compressed module has {WEIGHTS} and no other."
        )
    weights = path / WEIGHTS
    _refuse_outside(weights, path)
    if _describe(weights) != files[WEIGHTS]:
        raise CompressedFileError(
            f"`{weights}` is not the file that was saved: its size or its checksum is another. Copy the folder again."
        )
    _check_header(weights)
    try:
        return manifest, load_file(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CompressedFileError(f"`{weights}` is no valid file of tensors: {error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    _refuse_outside(file, path)
    manifest = _read_json(file)
    if manifest["format"] != FORMAT:
        raise CompressedFileError(
            f"`{file}` has format {manifest['format']!r} and this version reads format {FORMAT}; load it with the "
            f"version of lightning_memopt that wrote it ({manifest.get('versions', 'not recorded')})."
        )
    for key in ("tensors", "ties", "edits"):
        _mapping(manifest, key, path)
    return manifest


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > LARGEST_HEADER:
        raise CompressedFileError(f"`{file}` has {file.stat().st_size:,} bytes; no manifest is that large.")
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CompressedFileError(f"`{file}` is no JSON: {error}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CompressedFileError(f"`{file}` is not the manifest of a compressed module: it has no format.")
    return manifest


def _mapping(manifest: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = manifest.get(key)
    if not isinstance(value, dict):
        raise CompressedFileError(
            f"`{path / MANIFEST}` is damaged: its {key!r} is {type(value).__name__}, not a mapping."
        )
    return value


def _refuse_outside(file: Path, folder: Path) -> None:
    if not file.is_file():
        raise CompressedFileError(f"`{folder}` is not a compressed module: it has no {file.name}.")
    if file.resolve().parent != folder.resolve():
        raise CompressedFileError(f"`{file}` leads out of its folder, to `{file.resolve()}`; it is not read.")


def _check_header(weights: Path) -> None:
    size = weights.stat().st_size
    with weights.open("rb") as file:
        start = file.read(8)
    if len(start) < 8 or struct.unpack("<Q", start)[0] > min(LARGEST_HEADER, size - 8):
        raise CompressedFileError(f"`{weights}` has a header that is longer than the file or than any is.")


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
