"""Read a module from a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_memopt.compression.container import files, skeleton, tensors
from lightning_memopt.compression.container.errors import CompressedFileError
from lightning_memopt.compression.container.save import named_tensors


def load_compressed(
    path: str | Path, module: nn.Module | Callable[[], nn.Module] | None = None
) -> nn.Module:
    """Read what :func:`save_compressed` wrote: a module in evaluation mode on the CPU, ready to predict.

    No pickle is read. Sizes and checksums are verified, then shapes against the module. A folder names the class that it
    is built from, and importing that runs code of yours or of what is installed: give ``module`` for a folder from someone
    whom you do not trust.

    Args:
        path: The folder.
        module: What to load into: a module built as the one that was saved, or what builds one. ``None``: one of the
            recorded class, with the recorded hyper-parameters.

    Raises:
        CompressedFileError: The folder is damaged, of another version, leads elsewhere, or does not fit the module.

    Example:
        >>> import tempfile
        >>> from lightning_memopt.compression.container import save_compressed
        >>> folder = save_compressed(nn.Linear(4, 2), tempfile.mkdtemp() + "/net")
        >>> load_compressed(folder, module=nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)
    """
    manifest, data = files.read_folder(Path(path))
    loaded = {name: tensors.read_tensor(name, record, data) for name, record in manifest["tensors"].items()}
    target = skeleton.build(manifest, module)
    _check_names(target, loaded, manifest["ties"])
    reshaped = set(manifest["edits"])
    for name, tensor in loaded.items():
        _assign(target, name, tensor, reshaped)
    for alias, name in manifest["ties"].items():
        _set(target, alias, _get(target, name))
    return target.eval()


def _check_names(target: nn.Module, loaded: Mapping[str, Tensor], ties: Mapping[str, Any]) -> None:
    present = {name for name, _ in named_tensors(target)}
    stored = {*loaded, *ties}
    if present != stored or not set(ties.values()) <= set(loaded):
        missing, unexpected = sorted(present - stored), sorted(stored - present)
        raise CompressedFileError(
            f"The folder does not fit {type(target).__name__}: it lacks {missing[:5] or 'nothing'} and has "
            f"{unexpected[:5] or 'nothing'} that the module has not. Give a module built as the one that was saved."
        )


def _assign(target: nn.Module, name: str, tensor: Tensor, reshaped: set[str]) -> None:
    old = _get(target, name)
    if old.shape != tensor.shape and name.rpartition(".")[0] not in reshaped:
        raise CompressedFileError(
            f"`{name}` has shape {list(tensor.shape)} in the folder and {list(old.shape)} in "
            f"{type(target).__name__}; give a module built as the one that was saved."
        )
    if isinstance(old, nn.Parameter):
        trains = old.requires_grad and type(tensor) is Tensor and tensor.is_floating_point()
        tensor = nn.Parameter(tensor, requires_grad=trains)
    _set(target, name, tensor)


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    held = part._parameters.get(key)
    return part._buffers[key] if held is None else held  # type: ignore[return-value]


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    (part._parameters if key in part._parameters else part._buffers)[key] = tensor  # type: ignore[assignment]
