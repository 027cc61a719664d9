"""Lossless encodings: the smallest is chosen, every bit comes back, and what does not fit is refused."""

from dataclasses import replace

import pytest
import torch

from lightning_memopt.compression.codecs import Encoded, decode, encode

_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _sparse(*shape: int, density: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    return _random(*shape, dtype=dtype).masked_fill(~keep, 0)


def _grouped(rows: int, columns: int, kept: int, length: int) -> torch.Tensor:
    groups = _random(rows, columns // length, length)
    return groups.masked_fill(groups.abs().argsort(-1).argsort(-1) < length - kept, 0).view(rows, columns)


def _clustered(*shape: int, values: int) -> torch.Tensor:
    return _random(values)[torch.randint(values, shape, generator=torch.Generator().manual_seed(2))]


def _assert_same_bits(first: torch.Tensor, second: torch.Tensor) -> None:
    assert (first.shape, first.dtype) == (second.shape, second.dtype)
    integers = _AS_BITS.get(first.element_size())
    if integers is None:
        assert torch.equal(first, second)
    else:
        assert torch.equal(first.contiguous().view(integers), second.contiguous().view(integers))


_TENSORS = {
    "dense": (_random(64, 64), "dense", 1.0),
    "sparse": (_sparse(64, 64, density=0.2), "bitmask", 0.2 + 1 / 32 + 0.02),
    "2:4": (_grouped(64, 64, 2, 4), "2:4@1", 0.5 + 0.75 / 32),
    "1:4": (_grouped(64, 64, 1, 4), "1:4@1", 0.25 + 0.5 / 32),
    "4:8": (_grouped(64, 64, 4, 8), "4:8@1", 0.5 + 7 / 8 / 32),
    "2:4 along the first dimension": (_grouped(64, 64, 2, 4).T, "2:4@0", 0.5 + 0.75 / 32),
    "2:4 over input channels": (
        _grouped(256, 16, 2, 4).view(64, 2, 2, 16).movedim(-1, 1), "2:4@1", 0.5 + 0.75 / 32,
    ),
    "16 clusters": (_clustered(64, 64, values=16), "codebook", 4 / 32 + 16 / 4096),
    "17 clusters": (_clustered(64, 64, values=17), "codebook", 5 / 32 + 17 / 4096),
    "256 clusters": (_clustered(64, 64, values=256), "codebook", 8 / 32 + 256 / 4096),
    "257 clusters": (_clustered(64, 64, values=257), "dense", 1.0),
    "sparse and clustered": (
        _clustered(64, 64, values=16).masked_fill(_sparse(64, 64, density=0.1) == 0, 0), "bitmask+codebook",
        1 / 32 + 0.12 * 4 / 32 + 16 / 4096,
    ),
    "zeros": (torch.zeros(64, 64), "codebook", 1 / 4096),
    "tiny": (_sparse(4, 4, density=0.1), "dense", 1.0),
    "scalar": (torch.tensor(3.0), "dense", 1.0),
    "empty": (torch.empty(0, 3), "dense", 1.0),
    "bfloat16": (_sparse(64, 64, density=0.2, dtype=torch.bfloat16), "bitmask", 0.2 + 1 / 16 + 0.02),
    "int8": (_sparse(64, 64, density=0.2, dtype=torch.float32).mul(20).char(), None, 0.5),
    "bool": (_random(64, 64) > 0, "codebook", 1 / 8 + 2 / 4096),
    "complex128": (torch.zeros(8, dtype=torch.complex128), "dense", 1.0),
    "long": (torch.arange(64).repeat(8), "codebook", 6 / 64 + 64 / 512),
    "not contiguous": (_sparse(64, 64, density=0.2).T, "bitmask", 0.2 + 1 / 32 + 0.02),
}  # fmt: skip


@pytest.mark.parametrize("name", _TENSORS)
def test_every_bit_comes_back_from_the_encoding_that_its_zeros_and_values_allow(name):
    tensor, encoding, share = _TENSORS[name]
    encoded = encode(tensor)
    assert encoding is None or encoded.encoding == encoding
    assert encoded.nbytes <= share * tensor.nbytes
    _assert_same_bits(decode(encoded), tensor)


def test_negative_zeros_and_payloads_of_nans_are_values_like_others():
    tensor = _sparse(64, 64, density=0.2)
    tensor[0, :5] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 0.0])
    tensor[1, 0] = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)[0]
    encoded = encode(tensor)
    assert encoded.encoding == "bitmask"
    _assert_same_bits(decode(encoded), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_zeros_with_a_sign_as_a_product_with_a_mask_makes_them_cost_a_bit_each(dtype):
    weight = _random(64, 64)
    tensor = (weight * (_sparse(64, 64, density=0.2) != 0)).to(dtype)
    encoded = encode(tensor)
    assert encoded.encoding.startswith("signed-bitmask")
    assert encoded.nbytes <= 64 * 64 * (1.8 + 0.22 * 8 * tensor.element_size()) / 8 + 256
    _assert_same_bits(decode(encoded), tensor)
    with pytest.raises(ValueError, match="numbers of 1 bits take"):
        decode(replace(encoded, tensors=encoded.tensors | {"signs": encoded.tensors["signs"][:-1]}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_groups_and_clusters_work_in_every_element_size(dtype):
    for tensor in (_grouped(16, 64, 2, 4).to(dtype), _clustered(64, 64, values=5).to(dtype)):
        encoded = encode(tensor)
        assert encoded.nbytes < 0.75 * tensor.nbytes
        _assert_same_bits(decode(encoded), tensor)


def test_an_encoding_does_not_keep_the_whole_tensor_alive_or_share_memory_between_parts():
    encoded = encode(_sparse(64, 64, density=0.2))
    for stored in encoded.tensors.values():
        assert stored.untyped_storage().nbytes() == stored.nbytes


def test_a_tensor_without_elements_of_its_own_is_refused():
    with pytest.raises(ValueError, match="on meta has no plain elements"):
        encode(torch.empty(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo"):
        encode(torch.eye(4).to_sparse())


_BITMASK = encode(_TENSORS["sparse"][0])
_GROUPS = encode(_TENSORS["2:4"][0])
_CODEBOOK = encode(_TENSORS["17 clusters"][0])


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (replace(_BITMASK, encoding="huffman"), "'huffman' is no encoding that this version knows"),
        (replace(_BITMASK, encoding="+codebook"), "is no encoding"),
        (replace(_BITMASK, encoding="codebook"), "has indices, values, not positions, values"),
        (replace(_BITMASK, shape=(64, 65)), "numbers of 1 bits take 520 bytes, but"),
        (replace(_BITMASK, shape=(-64, -64)), "not"),
        (replace(_BITMASK, dtype=torch.int32), "The values are torch.float32, but the tensor is torch.int32"),
        (replace(_BITMASK, tensors=_BITMASK.tensors | {"values": torch.ones(3)}), r"needs \d+ values, not 3"),
        (replace(_GROUPS, shape=(64, 68)), "1088 numbers of 3 bits take 408 bytes"),
        (replace(_GROUPS, shape=(4096,)), "does not divide"),
        (replace(_GROUPS, tensors=_GROUPS.tensors | {"positions": torch.full((384,), 255, dtype=torch.uint8)}),
         "has choice 7; there are 6"),
        (replace(_CODEBOOK, tensors=_CODEBOOK.tensors | {"indices": torch.full((2560,), 255, dtype=torch.uint8)}),
         "has value 31 of a codebook of 17"),
        (replace(_CODEBOOK, tensors=_CODEBOOK.tensors | {"values": torch.ones(300)}), "1 to 256 values, not 300"),
        (Encoded("dense", {"values": torch.ones(5)}, (2, 2), torch.float32), "needs 4 values, not 5"),
    ],
)  # fmt: skip
def test_what_does_not_fit_its_encoding_is_refused(encoded, message):
    with pytest.raises(ValueError, match=message):
        decode(encoded)
