"""From a sharded checkpoint to one file, tensor by tensor, in one process and without the ranks that wrote it."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data

from lightning_memopt.checkpoints.atomic import replacing
from lightning_memopt.checkpoints.sharded import ShardedCheckpoint, state_key, weight_key

_MAP_SHARED = 1  # of mmap(2), which Python's `mmap` has on POSIX only

_SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


def consolidate(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the sharded checkpoint in ``directory`` as the one file that one device would have saved.

    The file is laid out without values first and then filled in place, so no more memory is used than for the largest
    tensor; besides, the file itself is mapped.

    Args:
        directory: Saved with ``save="sharded"`` or ``"async"``.
        out: The file; made whole or not at all.

    Raises:
        ValueError: No whole sharded checkpoint.
        OSError: No room for the file.
    """
    checkpoint = ShardedCheckpoint(directory)
    layout = _with_places(checkpoint)
    out = Path(out)
    needed = sum(_bytes_of(about) for about in checkpoint.tensors.values())
    with replacing(out, needed) as temporary:
        with FakeTensorMode(), skip_data(materialize_fake_tensors=True), temporary.open("wb") as file:
            torch.save(_emptied(layout, checkpoint), file)
        _reserve(temporary, temporary.stat().st_size)
        with set_default_mmap_options(_MAP_SHARED):
            mapped = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        _fill(mapped, layout, checkpoint)


def consolidate_to_safetensors(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the weights in ``directory`` as a safetensors file, one tensor after the other.

    The format is a length, a JSON header and the values (https://github.com/huggingface/safetensors). It has no tied
    tensors: each is written under the first of its names, and the header's metadata has ``{other name: first name}``.

    Args:
        directory: Saved with ``save="sharded"`` or ``"async"``.
        out: The file; made whole or not at all.

    Raises:
        ValueError: No whole sharded checkpoint, or a type of number that safetensors does not have.
        OSError: No room for the file.
    """
    checkpoint = ShardedCheckpoint(directory)
    firsts = checkpoint.about["weights"]
    names = [name for name, first in firsts.items() if first == name and weight_key(name) in checkpoint.tensors]
    for name in names:
        dtype = checkpoint.tensors[weight_key(name)].properties.dtype
        if dtype not in _SAFETENSORS_TYPES:
            raise ValueError(f"`{name}` is {dtype}, which safetensors does not have; write a .ckpt.")
    # The widest numbers first, so that each tensor begins at a multiple of its own.
    names.sort(key=lambda name: -checkpoint.tensors[weight_key(name)].properties.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    header["__metadata__"].update({name: first for name, first in firsts.items() if first != name})
    end = 0
    for name in names:
        about = checkpoint.tensors[weight_key(name)]
        begin, end = end, end + _bytes_of(about)
        kind = _SAFETENSORS_TYPES[about.properties.dtype]
        header[name] = {"dtype": kind, "shape": list(about.size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 16 + 8)  # with the length before it a multiple of 16
    size = 8 + len(text) + end
    out = Path(out)
    with replacing(out, size) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text)
        _reserve(temporary, size)
        mapped = torch.from_file(str(temporary), shared=True, size=size, dtype=torch.uint8)[8 + len(text) :]
        for name in names:
            about = checkpoint.tensors[weight_key(name)]
            values = mapped[slice(*header[name]["data_offsets"])].view(about.properties.dtype)
            checkpoint.read(weight_key(name), into=values.view(about.size))


class _Place:
    """Where in the sharded checkpoint a tensor of the file comes from."""

    def __init__(self, key: str) -> None:
        self.key = key


def _with_places(checkpoint: ShardedCheckpoint) -> dict[str, Any]:
    """Lightning's checkpoint, with a :class:`_Place` for each tensor that ranks wrote; one for each group of ties."""
    weights = {state: _weight_places(about, state) for state, about in checkpoint.states.items()}
    layout = {**checkpoint.rest, "state_dict": weights.pop("weights"), **weights}
    if checkpoint.about["optimizers"]:
        layout["optimizer_states"] = [
            {"state": _state_places(number, of), **of["others"]}
            for number, of in enumerate(checkpoint.about["optimizers"])
        ]
    return layout


def _weight_places(about: Mapping[str, Any], state: str) -> dict[str, Any]:
    places = {first: _Place(weight_key(first, state)) for first in about["weights"].values()}
    return {
        name: about["plain_weights"][name] if name in about["plain_weights"] else places[first]
        for name, first in about["weights"].items()
    }


def _state_places(number: int, about: Mapping[str, Any]) -> dict[Any, Any]:
    state: dict[Any, Any] = {}
    for index, name in about["names"].items():
        plain = about["plain"].get(name, {})
        if name in about["order"]:
            state[index] = {
                key: plain[key] if key in plain else _Place(state_key(number, name, key))
                for key in about["order"][name]
            }
    return {**state, **about["unnamed"]}


def _emptied(layout: Any, checkpoint: ShardedCheckpoint) -> Any:
    """``layout`` with tensors that have a size and no values; where there was one, there is one."""
    made: dict[int, Tensor] = {}

    def empty(part: Any) -> Any:
        if isinstance(part, _Place):
            about = checkpoint.tensors[part.key]
            if id(part) not in made:
                made[id(part)] = torch.empty(about.size, dtype=about.properties.dtype)
            return made[id(part)]
        if isinstance(part, Tensor):
            return torch.empty(part.shape, dtype=part.dtype)
        if isinstance(part, dict):
            return type(part)((key, empty(value)) for key, value in part.items())
        if isinstance(part, list | tuple):
            return type(part)(empty(value) for value in part)
        return part

    return empty(layout)


def _fill(mapped: Any, layout: Any, checkpoint: ShardedCheckpoint) -> None:
    filled: set[int] = set()
    for target, source in _pairs(mapped, layout):
        if isinstance(source, Tensor):
            target.copy_(source)
        elif id(source) not in filled:
            filled.add(id(source))
            checkpoint.read(source.key, into=target)


def _pairs(mapped: Any, layout: Any) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(layout, Tensor | _Place):
        yield mapped, layout
    elif isinstance(layout, dict):
        for key, value in layout.items():
            yield from _pairs(mapped[key], value)
    elif isinstance(layout, list | tuple):
        for part, value in zip(mapped, layout, strict=True):
            yield from _pairs(part, value)


def _reserve(path: Path, size: int) -> None:
    """Take the blocks of the file now: a full disk under a mapped file kills the process, with no error."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _bytes_of(about: Any) -> int:
    size: int = about.size.numel() * about.properties.dtype.itemsize
    return size
