"""Read a module from a folder."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_memopt.compression.container import exported, files, skeleton, tensors
from lightning_memopt.compression.container.errors import CompressedFileError
from lightning_memopt.compression.container.extra_state import restore_extra
from lightning_memopt.compression.container.save import named_tensors
from lightning_memopt.compression.placing import order_weights


def load_compressed(path: str | Path, module: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Read what :func:`save_compressed` wrote: a module in evaluation mode on the CPU, ready to predict.

    No pickle is read. Sizes and checksums are verified, then shapes against the module. A folder names the class that
    it is built from, and importing that runs code of yours or of what is installed: give ``module`` for a folder from
    someone whom you do not trust.

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
    records, ties = manifest["tensors"], manifest["ties"]
    target = skeleton.build(manifest, module)
    exported.export_again(target, manifest.get("exported", {}), manifest.get("versions"))
    _check_names(target, set(records), ties)
    for name, record in records.items():
        old = _get(target, name)
        # Before decoding: an encoding of equal values takes no bytes, whatever shape it says.
        _check_shape(
            target,
            name,
            old,
            tensors.read_shape(name, record),
            is_edited=name.rpartition(".")[0] in manifest["edits"],
        )
        tensor = tensors.read_tensor(name, record, data)
        exported.check_held(target, name, old, tensor, manifest.get("versions"))
        _set(target, name, _as_before(old, tensor))
    for alias, name in ties.items():
        _check_shape(
            target,
            alias,
            _get(target, alias),
            tuple(_get(target, name).shape),
            is_edited=alias.rpartition(".")[0] in manifest["edits"],
        )
        _set(target, alias, _get(target, name))
    restore_extra(target, manifest.get("extra", {}))
    order_weights(target)
    return target.eval()


def _check_names(target: nn.Module, records: set[str], ties: Mapping[str, Any]) -> None:
    present = {name for name, _ in named_tensors(target)}
    stored = {*records, *ties}
    if present != stored or not all(isinstance(name, str) and name in records for name in ties.values()):
        missing, unexpected = sorted(present - stored), sorted(stored - present)
        raise CompressedFileError(
            f"The folder does not fit {type(target).__name__}: it lacks {missing[:5] or 'nothing'} and has "
            f"{unexpected[:5] or 'nothing'} that the module has not. Give a module built as the one that was saved."
        )


def _check_shape(target: nn.Module, name: str, old: Tensor, shape: tuple[int, ...], *, is_edited: bool) -> None:
    if is_lazy(old):
        raise CompressedFileError(
            f"`{name}` of {type(target).__name__} has no shape before it has seen a batch. Run the module on one and "
            "give it as `module`."
        )
    if old.shape == shape or (is_edited and old.dim() == len(shape) and prod(shape) <= old.numel()):
        return
    raise CompressedFileError(
        f"`{name}` has shape {list(shape)} in the folder and {list(old.shape)} in {type(target).__name__}; give a "
        "module built as the one that was saved."
    )


def _as_before(old: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(old, nn.Parameter):
        return tensor
    trains = old.requires_grad and type(tensor) is Tensor and tensor.is_floating_point()
    return nn.Parameter(tensor, requires_grad=trains)


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    held = part._parameters.get(key)
    return part._buffers[key] if held is None else held  # type: ignore[return-value]


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    (part._parameters if key in part._parameters else part._buffers)[key] = tensor  # type: ignore[assignment]
