"""Parts that are exported graphs: what they are exported from again, since graphs are written by pickle alone.

A file has the arguments that each part was exported with, the sizes that its tensors had then, the ranges of what is
rounded in it, and its tensors. To load it, the part is exported from the module as its class builds it, and takes the
tensors of the file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.compression.container.errors import CompressedFileError
from lightning_memopt.compression.exported.module import ExportedModule


def describe_exported(module: nn.Module) -> dict[str, Any]:
    """What the exported parts of ``module`` are exported from again, by their names."""
    return {
        name: {
            "inputs": part.inputs,
            "sizes": {key: list(tensor.shape) for key, tensor in _tensors(part.source).items()},
            "ranges": {key: list(pair) for key, pair in part.ranges.items()},
        }
        for name, part in _exported(module).items()
    }


def versions() -> dict[str, str]:
    """What exports here: another version may make other graphs."""
    try:
        return {"torch": torch.__version__, "torchao": version("torchao")}
    except PackageNotFoundError:
        return {"torch": torch.__version__}


@contextmanager
def with_sources(module: nn.Module) -> Iterator[None]:
    """Within the block the exported parts of ``module`` are what they were exported from, without its numbers."""
    parts = _exported(module)
    try:
        for name, part in parts.items():
            _put(module, name, part.source)
        yield
    finally:
        for name, part in parts.items():
            _put(module, name, part)


def export_again(target: nn.Module, records: Any, written_by: Any) -> None:
    """Export the parts of ``target`` that ``records`` name, as :func:`describe_exported` wrote them.

    Args:
        target: A module as its class builds it; in evaluation mode afterwards.
        records: Of the manifest.
        written_by: The versions of the manifest.

    Raises:
        CompressedFileError: A record is malformed or does not fit the module, or the export differs or fails.
        ImportError: torchao is missing.
        ValueError: This is no x86 processor.
    """
    from lightning_memopt.compression.exported.graph import convert, export_observed, require_torchao, require_x86

    if not isinstance(records, dict):
        raise CompressedFileError(f"The exported parts are {records!r}, which are no mapping.")
    if not records:
        return
    require_torchao()
    require_x86(torch.device("cpu"))
    target.eval()
    names = dict(target.named_modules())
    for name, record in records.items():
        if not name or name not in names or any(name.startswith(f"{other}.") for other in records):
            raise CompressedFileError(f"`{name}` of {type(target).__name__} is no part that can be an exported one.")
        inputs, sizes, ranges = _read_record(name, record)
        _make_smaller(name, names[name], sizes)
        try:
            graph = convert(export_observed(names[name], inputs)[0], ranges)
        except Exception as error:  # of whatever in the module, or in what is asked of it, cannot be exported
            raise CompressedFileError(
                f"`{name}` ({type(names[name]).__name__}) does not become the graph that was saved "
                f"({type(error).__name__}: {error}). The folder was written by {written_by}, and here are "
                f"{versions()}: load it with those, and give a module built as the one that was saved."
            ) from error
        exported = ExportedModule(graph, names[name], inputs, ranges)
        names[name].to("meta")
        _put(target, name, exported)


def check_held(target: nn.Module, name: str, held: Tensor, stored: Tensor, written_by: Any) -> None:
    """Raise where a tensor of an exported part is not to be exchanged for that of the file.

    Raises:
        CompressedFileError: Its shape or its type is another.
    """
    if not any(name.startswith(f"{part}.") for part in _exported(target)):
        return
    if type(stored) is not Tensor or stored.shape != held.shape or stored.dtype != held.dtype:
        raise CompressedFileError(
            f"`{name}` is a {type(stored).__name__} of {stored.dtype} and shape {list(stored.shape)} in the folder, "
            f"and of {held.dtype} and {list(held.shape)} in what is exported here. The folder was written by "
            f"{written_by}, and here are {versions()}: load it with those."
        )


def _read_record(name: str, record: Any) -> tuple[list[Any], dict[str, Any], dict[str, tuple[float, float]]]:
    match record:
        case {"inputs": [args, kwargs], "sizes": dict(sizes), "ranges": dict(ranges)}:
            if all(map(_is_range, ranges.values())):
                return [args, kwargs], sizes, {key: (low, high) for key, (low, high) in ranges.items()}
    raise CompressedFileError(f"`{name}` is exported as {record!r}, which this version does not know.")


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and [type(end) for end in value] == [float, float]


def _make_smaller(name: str, part: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Give tensors of ``part`` the sizes that they had after structured pruning."""
    tensors = _tensors(part)
    for key, shape in sizes.items():
        held = tensors.get(key)
        is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if held is None or not is_shape or held.dim() != len(shape) or prod(shape) > held.numel():
            raise CompressedFileError(
                f"`{name}.{key}` had sizes {shape!r}, which that of {type(part).__name__} cannot be cut to. Give a "
                "module built as the one that was saved."
            )
        if list(held.shape) != shape:
            owner, _, own = key.rpartition(".")
            held_by = part.get_submodule(owner)
            cut = held.new_zeros(shape)
            setattr(held_by, own, nn.Parameter(cut) if isinstance(held, nn.Parameter) else cut)


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    return dict([*part.named_parameters(), *part.named_buffers()])


def _exported(module: nn.Module) -> dict[str, ExportedModule]:
    return {name: part for name, part in module.named_modules() if isinstance(part, ExportedModule)}


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    owner, _, key = name.rpartition(".")
    module.get_submodule(owner)._modules[key] = part
