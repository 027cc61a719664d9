"""Small numbers side by side in bytes: masks at one bit, indices at as many as they need."""

from functools import cache

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By element size, the integer type as which elements of any type are seen as bits."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return -(-count * bits // 8)


def empty_packed(like: Tensor, bits: int) -> Tensor:
    """As many bytes as ``bits`` bits for each element of ``like`` take, where it has no values to make them of."""
    return torch.empty(packed_bytes(like.numel(), bits), dtype=torch.uint8, device=like.device)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack ``values``, each below ``2**bits``, the first into the lowest bits.

    Args:
        values: Of any shape; bool or an integer type.
        bits: 0 to 8.

    Returns:
        ``packed_bytes(values.numel(), bits)`` bytes, uint8.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]), 1)
        tensor([5], dtype=torch.uint8)
    """
    flat = values.reshape(-1).to(torch.uint8)
    if bits in (0, 8):
        return flat if bits else flat.new_empty(0)
    # Eight numbers fill `bits` whole bytes.
    octets = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    if bits == 1:  # masks: no detour over wide integers
        words = (octets << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(dim=1, dtype=torch.uint8)
        return words
    shifts = torch.arange(8, device=flat.device)
    words = (octets.long() << bits * shifts).sum(dim=1, keepdim=True)
    packed = (words >> 8 * shifts[:bits]).to(torch.uint8).view(-1)
    return packed[: packed_bytes(len(flat), bits)].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` numbers of ``packed``, uint8, one-dimensional.

    Raises:
        ValueError: There are more or fewer bytes than ``count`` numbers take.
    """
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ValueError(
            f"{count} numbers of {bits} bits take {packed_bytes(count, bits)} bytes, but there is a tensor of "
            f"{packed.dtype} of shape {tuple(packed.shape)}."
        )
    if bits in (0, 8):
        return packed if bits else packed.new_zeros(count)
    if 8 % bits == 0:
        # Masks are unpacked in every step: one look-up a byte, of all the numbers that are in it.
        return _numbers_in_bytes(bits, packed.device)[packed.int()].view(torch.uint8)[:count]
    groups = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()
    shifts = torch.arange(8, device=packed.device)
    words = (groups << 8 * shifts[:bits]).sum(dim=1, keepdim=True)
    return ((words >> bits * shifts) & (2**bits - 1)).to(torch.uint8).view(-1)[:count]


@cache
def _numbers_in_bytes(bits: int, device: torch.device) -> Tensor:
    """For each byte the numbers in it, a byte each, seen as one integer."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    numbers = (torch.arange(256, dtype=torch.uint8)[:, None] >> shifts) & (2**bits - 1)
    return numbers.view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]).view(-1).to(device)
