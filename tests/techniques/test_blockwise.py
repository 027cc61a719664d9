"""Block-wise quantization: the formats of bitsandbytes and torchao, to within half a level."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.techniques.blockwise import BLOCK_SIZES, BlockwiseCodec, as_packed, make_levels

CASES = [(name, signed) for name in BLOCK_SIZES for signed in (True, False)]
ASCENDING = [(name, signed) for name, signed in CASES if name != "float8"]
"""Those whose codes are in the order of their levels."""


def _values(numel: int, signed: bool) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    return values if signed else values.square()


@pytest.mark.parametrize(("name", "signed"), CASES)
def test_what_is_unpacked_reproducibly_is_packed_to_the_same_codes_and_scales(name, signed):
    codec = BlockwiseCodec(name)
    packed = codec.pack(_values(100_003, signed) ** 3, signed)
    again = codec.pack(codec.unpack(packed, 0, 100_003, reproducibly=True), signed)
    assert torch.equal(packed["codes"], again["codes"]) and torch.equal(packed["scales"], again["scales"])


@pytest.mark.parametrize("format_name", BLOCK_SIZES)
def test_nothing_can_be_packed(format_name):
    codec = BlockwiseCodec(format_name)
    assert codec.unpack(codec.pack(torch.zeros(0), signed=True), 0, 0).shape == (0,)


@pytest.mark.parametrize(("name", "signed"), ASCENDING)
def test_levels_are_ascending_within_one_and_fit_the_code(name, signed):
    levels = torch.tensor(make_levels(name, signed))
    assert len(levels) <= (16 if name == "4-bit" else 256)
    assert (levels.diff() > 0).all()
    assert levels[-1] == 1
    assert (0 in levels) == (signed or name == "8-bit with zero")


@pytest.mark.parametrize(("name", "signed"), ASCENDING)
def test_each_element_becomes_the_nearest_level_of_its_block(name, signed):
    codec = BlockwiseCodec(name)
    values = _values(10 * codec.block_size + 3, signed)
    unpacked = codec.unpack(codec.pack(values, signed), 0, values.numel())
    levels = torch.tensor(make_levels(name, signed))
    for start in range(0, values.numel(), codec.block_size):
        block = values[start : start + codec.block_size]
        scale = block.abs().max()
        best = (block.unsqueeze(1) / scale - levels).abs().amin(dim=1)
        error = (block - unpacked[start : start + codec.block_size]).abs() / scale
        # Codes are looked up by the element rounded to fp16, so ties may fall to the other side.
        assert (error <= best + 2**-11).all()


def test_the_8_bit_levels_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        ours, theirs = torch.tensor(make_levels("8-bit", signed)), functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-7)
    assert make_levels("8-bit", False)[0] > 0  # theirs is 0


def test_packing_in_8_bits_gives_what_bitsandbytes_gives():
    functional = pytest.importorskip("bitsandbytes.functional")
    values, codec = _values(4096, True), BlockwiseCodec("8-bit")
    packed = codec.pack(values, signed=True)
    codes, state = functional.quantize_blockwise(values, functional.create_dynamic_map(), blocksize=256)
    torch.testing.assert_close(packed["scales"], state.absmax)
    assert (packed["codes"] == codes).float().mean() > 0.99
    theirs = functional.dequantize_blockwise(codes, state)
    assert (codec.unpack(packed, 0, 4096) - values).abs().mean() <= (theirs - values).abs().mean() * 1.001


def test_packing_in_4_bits_gives_what_torchao_gives():
    subclass = pytest.importorskip("torchao.optim.subclass_4bit")
    codec = BlockwiseCodec("4-bit")
    for signed in (True, False):
        values = _values(4096, signed)
        theirs = subclass.OptimState4bit.zeros((4096,), signed, 128)
        theirs.copy_(values)
        packed = codec.pack(values, signed)
        same = torch.isclose(codec.unpack(packed, 0, 4096), theirs.dequantize(), rtol=1e-6, atol=0)
        assert same.float().mean() > 0.99


def test_packing_in_fp8_gives_the_values_of_float8():
    values, codec = _values(4096, True), BlockwiseCodec("fp8")
    blocks = values.view(-1, 256)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 448
    expected = ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).view(-1)
    same = torch.isclose(codec.unpack(codec.pack(values, True), 0, 4096), expected, rtol=1e-6, atol=0)
    assert same.float().mean() > 0.99


def test_the_levels_of_8_bits_with_zero_are_those_of_both_libraries():
    functional = pytest.importorskip("bitsandbytes.functional")
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    for signed, theirs in ((True, subclass.get_qmap_signed()), (False, subclass.get_qmap_unsigned())):
        levels = functional.create_dynamic_map(signed=signed)
        assert torch.equal(levels, torch.tensor(theirs))
        torch.testing.assert_close(torch.tensor(make_levels("8-bit with zero", signed)), levels, rtol=1e-6, atol=0)


def test_packing_in_float8_gives_the_bits_and_the_scales_of_torchao():
    subclass = pytest.importorskip("torchao.optim.subclass_fp8")
    values = _values(4096, True)
    theirs = subclass.OptimStateFp8.zeros((4096,), 256)
    theirs.copy_(values)
    packed = BlockwiseCodec("float8").pack(values, signed=True)
    assert torch.equal(packed["scales"], theirs.scale)
    assert (packed["codes"].view(torch.float8_e4m3fn).float() == theirs.codes.float()).float().mean() > 0.99


@pytest.mark.parametrize("name", BLOCK_SIZES)
def test_pieces_written_and_read_one_by_one_are_the_whole(name):
    codec = BlockwiseCodec(name)
    values = _values(1000, True)
    whole, pieces = codec.pack(values, True), codec.empty(1000, True, values)
    for start in (512, 0):
        codec.write(pieces, start, values[start : start + 512])
    assert all(torch.equal(pieces[key], whole[key]) for key in ("codes", "scales"))
    read = torch.cat([codec.unpack(whole, 0, 512), codec.unpack(whole, 512, 1000)])
    torch.testing.assert_close(read, codec.unpack(whole, 0, 1000), rtol=0, atol=0)


@pytest.mark.parametrize("name", BLOCK_SIZES)
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(name):
    codec = BlockwiseCodec(name)
    for signed in (True, False):
        zeros = codec.unpack(codec.pack(torch.zeros(300), signed), 0, 300)
        assert (zeros == 0).all()
    values = _values(300, True)
    values[7] = float("nan")
    unpacked = codec.unpack(codec.pack(values, True), 0, 300)
    assert unpacked[7].isnan()
    assert unpacked[codec.block_size :].isfinite().all()


def test_a_small_second_moment_beside_a_large_one_does_not_become_zero():
    values = torch.full((256,), 1e-9)
    values[0] = 1.0
    for name in ("8-bit", "4-bit", "fp8"):
        assert (BlockwiseCodec(name).unpack(BlockwiseCodec(name).pack(values, False), 0, 256) > 0).all()


def test_fake_tensors_take_the_same_bytes_as_real_ones():
    for name in BLOCK_SIZES:
        real = BlockwiseCodec(name).pack(torch.ones(1000), True)
        with FakeTensorMode():
            fake = BlockwiseCodec(name).pack(torch.ones(1000), True)
        assert [real[key].nbytes for key in ("codes", "scales")] == [fake[key].nbytes for key in ("codes", "scales")]


def test_an_unknown_format_is_refused_with_the_possible_ones():
    with pytest.raises(ValueError, match=r"'2-bit' is unknown; possible are 8-bit, 4-bit, fp8"):
        BlockwiseCodec("2-bit")


def test_only_packed_tensors_are_taken_for_packed():
    assert as_packed(BlockwiseCodec("8-bit").pack(torch.ones(4), True)) is not None
    assert as_packed({"codes": torch.ones(1)}) is None
    assert as_packed(torch.ones(1)) is None
