"""Packing of small numbers."""

import pytest
import torch

from lightning_memopt.compression.bits import pack_bits, packed_bytes, unpack_bits


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_numbers_of_every_width_come_back_and_take_no_more_bytes_than_their_bits(bits, count):
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(count, bits) == (count * bits + 7) // 8
    assert torch.equal(unpack_bits(packed, bits, count).long(), values)


def test_too_few_and_too_many_bytes_are_refused():
    packed = pack_bits(torch.ones(9, dtype=torch.bool), 1)
    for count in (8, 17):
        with pytest.raises(ValueError, match=rf"{count} numbers of 1 bits take \d bytes, but"):
            unpack_bits(packed, 1, count)
