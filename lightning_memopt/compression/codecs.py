"""Write one tensor in as few bytes as hold it exactly: what is sparse or clustered becomes small, whoever made it so.

An encoding is ``"dense"``, a way to say where the zeros are, ``"codebook"``, or both as in ``"bitmask+codebook"``:

========================  ==========================================================================================
``"bitmask"``             a bit for each element, and the elements that are not zero
``"signed-bitmask"``      the same, where many zeros are -0.0, as products with a mask are: a bit more for each zero
``"2:4@1"`` and the like  of every 4 elements along dimension 1 the 2 that may be non-zero, and which two these are,
                          as a number below C(4, 2): 0.75 bits an element
``"codebook"``            at most 256 distinct values, and for each element the number of its value, in as few bits as
                          count them
========================  ==========================================================================================

Elements are compared as bits, so that -0.0 is told from 0.0 and every NaN keeps its payload.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb, prod

import torch
from torch import Tensor

from lightning_memopt.compression.bits import INTEGERS, pack_bits, packed_bytes, unpack_bits
from lightning_memopt.compression.patterns import GROUPS

LARGEST_CODEBOOK = 256

COST_OF_A_TENSOR = 128
"""Bytes that a further tensor costs in a file: its name, type, shape and offsets."""

_ENCODING = re.compile(r"dense|(?:((?:signed-)?bitmask|[1-7]:[48]@\d)(?:\+(codebook))?)|(codebook)")


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is written.

    Attributes:
        encoding: How; see the module.
        tensors: What is stored, by role; on the CPU.
        shape: Shape of the tensor.
        dtype: Its type.
    """

    encoding: str
    tensors: dict[str, Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@torch.no_grad()
def encode(tensor: Tensor) -> Encoded:
    """Write ``tensor`` in the smallest of the encodings that hold it exactly.

    Args:
        tensor: A plain dense tensor of any type, shape and device.

    Raises:
        ValueError: It is on the meta device, or a subclass or layout that has no plain elements.

    Example:
        >>> encoded = encode(torch.eye(64))
        >>> encoded.encoding, encoded.nbytes
        ('codebook', 520)
        >>> torch.equal(decode(encoded), torch.eye(64))
        True
    """
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            f"A {type(tensor).__name__} of layout {tensor.layout} on {tensor.device} has no plain elements to "
            "encode. Make it whole and dense first."
        )
    tensor = tensor.detach().cpu().contiguous()
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if not tensor.numel() or tensor.element_size() not in INTEGERS:
        return Encoded("dense", {"values": tensor}, shape, dtype)
    bits = tensor.view(INTEGERS[tensor.element_size()])
    sparse, zeros, rest = _split_sparse(bits)
    whole, rest_coded = _split_codebook(bits), _split_codebook(rest) if sparse else None
    candidates = [("dense", {"values": tensor})]
    if sparse:
        candidates.append((sparse, {**zeros, "values": rest.view(dtype)}))
    if whole:
        candidates.append(("codebook", {"indices": whole[0], "values": whole[1].view(dtype)}))
    if sparse and rest_coded:
        tensors = {**zeros, "indices": rest_coded[0], "values": rest_coded[1].view(dtype)}
        candidates.append((f"{sparse}+codebook", tensors))
    encoding, tensors = min(candidates, key=lambda candidate: _cost(candidate[1]))
    return Encoded(encoding, tensors, shape, dtype)


@torch.no_grad()
def decode(encoded: Encoded) -> Tensor:
    """The tensor, bit for bit, on the CPU.

    A tensor of one value takes no bytes for its elements: whoever reads what others wrote checks the shape first.

    Raises:
        ValueError: The encoding is unknown, or what is stored does not fit it, the shape or the type.
    """
    tensors, count = encoded.tensors, prod(encoded.shape)
    sparse, codebook = _parse(encoded.encoding)
    expected = {"values", *(["positions"] if sparse else []), *(["indices"] if codebook else [])}
    expected |= {"signs"} if sparse == "signed-bitmask" else set()
    if tensors.keys() != expected or any(size < 0 for size in encoded.shape):
        raise ValueError(
            f"{encoded.encoding!r} of shape {encoded.shape} has {', '.join(sorted(expected))}, not "
            f"{', '.join(sorted(tensors)) or 'nothing'}."
        )
    values = tensors["values"]
    if values.dtype != encoded.dtype:
        raise ValueError(f"The values are {values.dtype}, but the tensor is {encoded.dtype}.")
    bits = values.reshape(-1) if encoded.encoding == "dense" else values.reshape(-1).view(_as_bits(values))
    mask = _unpack_positions(sparse, tensors["positions"], encoded.shape) if sparse else None
    stored = count if mask is None else _stored(sparse, mask)
    if codebook:
        bits = _look_up(bits, tensors["indices"], stored)
    if len(bits) != stored:
        raise ValueError(f"{encoded.encoding!r} of shape {encoded.shape} needs {stored} values, not {len(bits)}.")
    if mask is not None:
        full = _spread(sparse, mask, bits, encoded.shape)
        bits = _restore_signs(full, mask, tensors["signs"]) if "signs" in tensors else full
    return bits.view(encoded.dtype).reshape(encoded.shape)


def _cost(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes + COST_OF_A_TENSOR for tensor in tensors.values())


def _as_bits(values: Tensor) -> torch.dtype:
    if values.element_size() not in INTEGERS:
        raise ValueError(f"Elements of {values.dtype} are stored densely only.")
    return INTEGERS[values.element_size()]


def _parse(encoding: str) -> tuple[str, bool]:
    """How zeros are said (``""``: they are not), and whether there is a codebook."""
    parts = _ENCODING.fullmatch(encoding)
    if parts is None:
        raise ValueError(
            f"{encoding!r} is no encoding that this version knows: dense, bitmask, signed-bitmask, "
            "n:m@dimension, codebook, or one of the three in the middle with +codebook."
        )
    return parts[1] or "", bool(parts[2] or parts[3])


# Zeros


def _split_sparse(bits: Tensor) -> tuple[str, dict[str, Tensor], Tensor]:
    """The best way to say where zeros are, with what it stores, and the elements that remain; or ``""`` and all."""
    mask, size = bits != 0, bits.element_size()
    is_signed_zero = bits == _sign_bit(bits)
    non_zero, signed = int(mask.count_nonzero()), int(is_signed_zero.count_nonzero())
    zeros = mask.numel() - non_zero + signed
    bitmask_bytes = packed_bytes(mask.numel(), 1)
    sizes = {"bitmask": bitmask_bytes + non_zero * size}
    if signed:
        sizes["signed-bitmask"] = bitmask_bytes + packed_bytes(zeros, 1) + (non_zero - signed) * size
    for kept, length, dimension in _find_groups(mask, non_zero):
        groups = mask.numel() // length
        index_bytes = packed_bytes(groups, _index_bits(kept, length))
        sizes[f"{kept}:{length}@{dimension}"] = index_bytes + groups * kept * size
    best = min(sizes, key=sizes.__getitem__)
    if sizes[best] >= bits.nbytes:
        return "", {}, bits
    if best == "bitmask":
        return best, {"positions": pack_bits(mask, 1)}, bits[mask]
    if best == "signed-bitmask":
        mask &= ~is_signed_zero
        return best, {"positions": pack_bits(mask, 1), "signs": pack_bits(is_signed_zero[~mask], 1)}, bits[mask]
    kept, length, dimension = map(int, re.findall(r"\d", best))
    rows = bits.movedim(dimension, -1).reshape(-1, length)
    numbers = _subset_numbers(kept, length)[_row_codes(rows != 0)]
    remaining = rows.gather(1, _subsets(kept, length)[numbers.long()])
    return best, {"positions": pack_bits(numbers, _index_bits(kept, length))}, remaining.reshape(-1)


def _sign_bit(bits: Tensor) -> int:
    """The integer of which only the highest bit is set: -0.0 of every floating-point type that has one."""
    return torch.iinfo(bits.dtype).min or 128


def _restore_signs(full: Tensor, mask: Tensor, packed: Tensor) -> Tensor:
    signs = unpack_bits(packed, 1, len(mask) - int(mask.count_nonzero())).bool()
    full[~mask] = torch.where(signs, _sign_bit(full), 0).to(full.dtype)
    return full


def _find_groups(mask: Tensor, non_zero: int) -> Iterator[tuple[int, int, int]]:
    """Of each dimension and length of groups: how many elements of a group are at most non-zero, if less than all."""
    for dimension, size in enumerate(mask.shape):
        for length in GROUPS:
            # A random pattern fills some group: looking is worth it only where groups can be equally full.
            if size % length or dimension > 9 or not non_zero:
                continue
            counts = mask.unflatten(dimension, (-1, length)).sum(dimension + 1, dtype=torch.uint8)
            kept = int(counts.max())
            if kept < length:
                yield kept, length, dimension


def _index_bits(kept: int, length: int) -> int:
    return (comb(length, kept) - 1).bit_length()


@cache
def _subsets(kept: int, length: int) -> Tensor:
    """Every choice of ``kept`` positions out of ``length``, one a row, in order."""
    return torch.tensor(list(combinations(range(length), kept)))


@cache
def _subset_numbers(kept: int, length: int) -> Tensor:
    """For each pattern of a group, as a number of ``length`` bits, the first choice of positions that covers it."""
    numbers = torch.zeros(2**length, dtype=torch.uint8)
    codes = (1 << _subsets(kept, length)).sum(dim=1)
    for number in reversed(range(len(codes))):
        covered = [code for code in range(2**length) if code & ~int(codes[number]) == 0]
        numbers[covered] = number
    return numbers


def _row_codes(rows: Tensor) -> Tensor:
    return pack_bits(torch.nn.functional.pad(rows, (0, 8 - rows.shape[1])), 1).long()


def _unpack_positions(sparse: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of a bitmask, or the numbers of the choices of groups."""
    count = prod(shape)
    if sparse.endswith("bitmask"):
        return unpack_bits(packed, 1, count).bool()
    kept, length, dimension = map(int, re.findall(r"\d", sparse))
    if dimension >= len(shape) or shape[dimension] % length:
        raise ValueError(f"{sparse!r} does not divide a tensor of shape {shape} into groups.")
    numbers = unpack_bits(packed, _index_bits(kept, length), count // length)
    if len(numbers) and int(numbers.max()) >= comb(length, kept):
        raise ValueError(f"A group of {sparse!r} has choice {int(numbers.max())}; there are {comb(length, kept)}.")
    return numbers


def _stored(sparse: str, mask: Tensor) -> int:
    return int(mask.count_nonzero()) if sparse.endswith("bitmask") else len(mask) * int(sparse[0])


def _spread(sparse: str, mask: Tensor, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    if sparse.endswith("bitmask"):
        full = bits.new_zeros(prod(shape))
        full[mask] = bits
        return full
    kept, length, dimension = map(int, re.findall(r"\d", sparse))
    rows = bits.new_zeros(len(mask), length)
    rows.scatter_(1, _subsets(kept, length)[mask.long()], bits.view(-1, kept))
    moved = [size for index, size in enumerate(shape) if index != dimension] + [shape[dimension]]
    return rows.view(moved).movedim(-1, dimension).contiguous()


# Few distinct values


def _split_codebook(bits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Packed numbers and the values that they stand for, or ``None`` where there are too many values."""
    flat = bits.reshape(-1)
    # The start of a tensor has nearly always all of them, or too many; sorting the whole of it is slow.
    values = flat[:4096].unique()
    if not 0 < len(values) <= LARGEST_CODEBOOK:
        return None
    indices = torch.searchsorted(values, flat).clamp_(max=len(values) - 1)
    unseen = values[indices] != flat
    if unseen.any():
        values = torch.cat([values, flat[unseen]]).unique()
        if len(values) > LARGEST_CODEBOOK:
            return None
        indices = torch.searchsorted(values, flat)
    return pack_bits(indices, (len(values) - 1).bit_length()), values


def _look_up(values: Tensor, packed: Tensor, count: int) -> Tensor:
    if not 0 < len(values) <= LARGEST_CODEBOOK:
        raise ValueError(f"A codebook has 1 to {LARGEST_CODEBOOK} values, not {len(values)}.")
    indices = unpack_bits(packed, (len(values) - 1).bit_length(), count)
    if count and int(indices.max()) >= len(values):
        raise ValueError(f"An element has value {int(indices.max())} of a codebook of {len(values)}.")
    return values[indices.long()]
