"""A tensor, plain or packed, as JSON records and plain tensors, and back."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.compression.codecs import Encoded, decode, encode
from lightning_memopt.compression.container.errors import CompressedFileError
from lightning_memopt.compression.packed import PACKED, PackedWeight

SLACK = 64
"""Elements that a part may have beyond those of its weight, which is filled up to whole groups."""

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    )
}  # fmt: skip

_KIND_OF = {cls: name for name, cls in PACKED.items()}


def write_tensor(name: str, tensor: Tensor, data: dict[str, Tensor]) -> dict[str, Any]:
    """Add what ``tensor`` is made of to ``data``, under names that begin with its own, and return its record.

    Raises:
        ValueError: The tensor is of a class or type that the container has no name for.
    """
    if isinstance(tensor, PackedWeight):
        tensor = tensor.plain()
        return {
            "packed": _KIND_OF[type(tensor)],
            "attributes": tensor.attributes,
            "shape": list(tensor.shape),
            "dtype": type_name(name, tensor),
            "parts": {
                part: _write_plain(f"{name}/{part}", value, data) for part, value in tensor.file_parts().items()
            },
        }
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ValueError(
            f"`{name}` is a {type(tensor).__name__}, which cannot be saved without pickle; quantize with "
            "`compression.quantize.quantize`, or bring it back to a plain tensor first."
        )
    return _write_plain(name, tensor, data)


def _write_plain(name: str, tensor: Tensor, data: dict[str, Tensor]) -> dict[str, Any]:
    """A dense tensor goes under its own name, and its record says no more than shape and type."""
    encoded = encode(tensor.detach().cpu())
    is_dense = encoded.encoding == "dense"
    for piece, value in encoded.tensors.items():
        key = name if is_dense else f"{name}/{piece}"
        if key in data:
            raise ValueError(f"`{key}` is the name of two tensors of a compressed file; rename the module's own.")
        # A copy: safetensors refuses tensors that share memory.
        data[key] = value.clone(memory_format=torch.contiguous_format)
    record = {"shape": list(encoded.shape), "dtype": type_name(name, tensor)}
    return record if is_dense else record | {"encoding": encoded.encoding, "tensors": sorted(encoded.tensors)}


def type_name(name: str, tensor: Tensor) -> str:
    """What files call the type of ``tensor``.

    Raises:
        ValueError: They have none; ``name`` is that of the tensor.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"`{name}` holds {tensor.dtype}, which a compressed file cannot; convert it first.")
    return dtype


def read_tensor(name: str, record: Any, data: Mapping[str, Tensor]) -> Tensor:
    """The tensor that :func:`write_tensor` made ``record`` of.

    Raises:
        CompressedFileError: The record is malformed, names what is not there, or does not fit the data.
    """
    try:
        if "packed" not in record:
            return _read_plain(name, record, data)
        cls = PACKED.get(record["packed"])
        limit = prod(_shape(record)) + SLACK
        if cls is None:
            raise CompressedFileError(
                f"`{name}` is packed as {record['packed']!r}, which this version does not know."
            )
        parts = {
            part: _read_plain(f"{name}/{part}", each, data, limit) for part, each in dict(record["parts"]).items()
        }
        packed = cls.from_file(parts, record["attributes"], _shape(record), DTYPES[record["dtype"]])
    except CompressedFileError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError, AttributeError) as error:
        raise CompressedFileError(
            f"`{name}` cannot be read: its record does not fit its data ({type(error).__name__}: {error})."
        ) from error
    return packed


def read_shape(name: str, record: Any) -> tuple[int, ...]:
    """The shape that ``record`` says its tensor has.

    Raises:
        CompressedFileError: It says none.
    """
    try:
        return _shape(record)
    except (KeyError, TypeError, ValueError) as error:
        raise CompressedFileError(f"`{name}` has no shape in the manifest ({error!r}).") from error


def _read_plain(name: str, record: Mapping[str, Any], data: Mapping[str, Tensor], limit: int | None = None) -> Tensor:
    if "encoding" in record:
        encoding, tensors = record["encoding"], {piece: data[f"{name}/{piece}"] for piece in record["tensors"]}
    else:
        encoding, tensors = "dense", {"values": data[name]}
    shape, dtype = _shape(record), DTYPES[record["dtype"]]
    if limit is not None and prod(shape) > limit:
        raise CompressedFileError(
            f"`{name}` says it has shape {list(shape)}, more than the weight that it is a part of."
        )
    tensor = decode(Encoded(encoding, tensors, shape, dtype))
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CompressedFileError(
            f"`{name}` says it is {record['dtype']} of shape {list(shape)} and holds {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )
    return tensor


def _shape(record: Mapping[str, Any]) -> tuple[int, ...]:
    shape = record["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is no shape")
    return tuple(shape)
