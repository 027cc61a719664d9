"""Write a module to a folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.__about__ import __version__
from lightning_memopt.compression.container import exported, files, skeleton, tensors
from lightning_memopt.compression.container.extra_state import read_extra


def save_compressed(module: nn.Module, path: str | Path) -> Path:
    """Write ``module`` to the folder ``path``, for :func:`load_compressed` to read.

    The folder has ``weights.safetensors`` and ``manifest.json``: the class and hyper-parameters that the module is
    built from, sizes that pruning changed, how each tensor is encoded, ties, versions and checksums. Each tensor
    takes the smallest exact encoding that it has: what is sparse, clustered or quantized is small on disk, whoever
    made it so.

    Args:
        module: Any module, quantized or pruned or neither. A ``LightningModule`` that calls
            ``save_hyperparameters`` with values that JSON can hold is loaded without its code being given.
        path: A new folder, or that of a compressed module and of nothing beside it, which is replaced once the new
            one is whole.

    Returns:
        The folder.

    Raises:
        ValueError: A tensor is of a class or type that cannot be written, extra state is no plain values, or the
            folder holds something else.
        OSError: The disk is full, or may not be written.

    Example:
        >>> import tempfile
        >>> folder = save_compressed(nn.Linear(4, 2), tempfile.mkdtemp() + "/net")
        >>> sorted(file.name for file in folder.iterdir())
        ['manifest.json', 'weights.safetensors']
    """
    data: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in named_tensors(module):
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
        else:
            records[name] = tensors.write_tensor(name, tensor, data)
    with exported.with_sources(module):
        described = skeleton.describe(module)
    manifest = {
        "versions": {"lightning_memopt": __version__, "torch": torch.__version__},
        **described,
        "tensors": records,
        "ties": ties,
    }
    if parts := exported.describe_exported(module):
        manifest["exported"] = parts
        manifest["versions"] |= exported.versions()
    if extra := read_extra(module):
        manifest["extra"] = extra
    folder = Path(path)
    files.write_folder(folder, manifest, data)
    return folder


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by all names that they have, shared ones by each."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        held = {**part._parameters, **part._buffers}
        for key, tensor in held.items():
            if tensor is not None and key not in part._non_persistent_buffers_set:
                yield f"{prefix}.{key}" if prefix else key, tensor
