"""Block-wise quantization of optimizer state: a few bits per element and one scale per block.

Each block of a tensor is divided by its largest magnitude and each element stored as the index of the nearest of a
fixed set of levels. Three sets, each with a signed form (first moments, momentum) and an unsigned one (second
moments):

- ``"8-bit"``: dynamic tree levels, blocks of 256 (Dettmers et al., 2021, https://arxiv.org/abs/2110.02861), the
  levels of bitsandbytes.
- ``"4-bit"``: dynamic levels, signed, or 16 equal steps without zero, unsigned, blocks of 128 (Li et al., 2023,
  https://arxiv.org/abs/2309.01507), the levels of torchao.
- ``"fp8"``: the values of float8 e4m3, blocks of 256.

No unsigned set of these has a zero. A second moment that is rounded to zero while the first is not divides by nothing
but ``eps`` (the "zero point problem" of Li et al.), so the smallest elements keep the smallest level instead.

Two more are what the kernels of libraries read and write (``"4-bit"`` is torchao's as it is):

- ``"8-bit with zero"``: bitsandbytes' and torchao's 8 bits, which are ``"8-bit"`` but for that zero.
- ``"float8"``: torchao's, where a code is the bits of a float8 e4m3, and a scale the largest magnitude over 448.
"""

from typing import Literal, TypedDict, cast

import torch

FormatName = Literal["8-bit", "4-bit", "fp8", "8-bit with zero", "float8"]

BLOCK_SIZES: dict[FormatName, int] = {"8-bit": 256, "4-bit": 128, "fp8": 256, "8-bit with zero": 256, "float8": 256}

_LARGEST_FLOAT8 = 448.0


class PackedTensor(TypedDict):
    """A tensor held in few bits: plain tensors in a plain dict, so that any checkpoint can hold it.

    ``codes`` is uint8, one element each (two in ``"4-bit"``, the first in the high half); ``scales`` is fp32, one per
    block. Both run over the tensor flattened, and end in padding where its size is no multiple of the block.
    ``dtype`` is the tensor's own.
    """

    format: str
    signed: bool
    dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor


class BlockwiseCodec:
    """Packs tensors into one format and unpacks them, in pieces, so that no full-size temporary exists.

    Args:
        format_name: One of :data:`BLOCK_SIZES`.

    Raises:
        ValueError: ``format_name`` is unknown.

    Example:
        >>> codec = BlockwiseCodec("8-bit")
        >>> packed = codec.pack(torch.linspace(-1, 1, 1000), signed=True)
        >>> packed["codes"].dtype, packed["codes"].numel(), packed["scales"].numel()
        (torch.uint8, 1024, 4)
        >>> (codec.unpack(packed, 0, 1000) - torch.linspace(-1, 1, 1000)).abs().max() < 0.02
        tensor(True)
    """

    def __init__(self, format_name: FormatName) -> None:
        if format_name not in BLOCK_SIZES:
            raise ValueError(f"The format {format_name!r} is unknown; possible are {', '.join(BLOCK_SIZES)}.")
        self.format_name = format_name
        self.block_size = BLOCK_SIZES[format_name]
        self._tables: dict[tuple[bool, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def empty(self, numel: int, signed: bool, like: torch.Tensor) -> PackedTensor:
        """Room for ``numel`` elements, all zero, of the type and on the device of ``like``."""
        blocks = -(-numel // self.block_size)
        code_bytes = blocks * self.block_size // self._codes_per_byte
        return {
            "format": self.format_name,
            "signed": signed,
            "dtype": like.dtype,
            "codes": torch.zeros(code_bytes, dtype=torch.uint8, device=like.device),
            "scales": torch.zeros(blocks, dtype=torch.float32, device=like.device),
        }

    def pack(self, tensor: torch.Tensor, signed: bool) -> PackedTensor:
        """The whole of ``tensor`` (any shape) packed."""
        packed = self.empty(tensor.numel(), signed, tensor)
        self.write(packed, 0, tensor.reshape(-1))
        return packed

    def write(self, packed: PackedTensor, start: int, values: torch.Tensor) -> None:
        """Overwrite the elements of ``packed`` from ``start`` (a multiple of the block) with the 1-d ``values``."""
        padding = -values.numel() % self.block_size
        padded = torch.nn.functional.pad(values.float(), (0, padding))
        blocks = padded.view(padded.numel() // self.block_size, self.block_size)  # none, where there are no values
        scales = blocks.abs().amax(dim=1) / self._largest_level
        # A block of zeros has scale 0, which makes any code a zero; dividing by 1 keeps NaN out of it.
        scaled = blocks / scales.where(scales > 0, 1.0).unsqueeze(1)
        _, nearest = self._table(packed["signed"], values.device)
        # The nearest level of each 16-bit float is looked up: one pass, exact up to fp16's own rounding.
        codes = nearest[scaled.half().view(torch.int16).int().add_(2**15)].view(-1)
        if self._codes_per_byte == 2:
            codes = (codes[::2] << 4) | codes[1::2]
        first_code, first_block = start // self._codes_per_byte, start // self.block_size
        packed["codes"][first_code : first_code + codes.numel()] = codes
        packed["scales"][first_block : first_block + scales.numel()] = scales

    def unpack(self, packed: PackedTensor, start: int, stop: int, *, reproducibly: bool = False) -> torch.Tensor:
        """Elements ``start`` (a multiple of the block) to ``stop`` of ``packed`` in fp32, 1-d.

        Args:
            packed: Of this codec's format.
            start: The first.
            stop: Behind the last.
            reproducibly: Packing what is returned gives ``packed`` again. The dynamic sets have no -1, so a block
                whose largest magnitude is negative has lost it to the next level; the lowest then stands for -1.
        """
        first_block, last_block = start // self.block_size, -(-stop // self.block_size)
        scales = packed["scales"][first_block:last_block]
        first, last = first_block * self.block_size, last_block * self.block_size
        codes = packed["codes"][first // self._codes_per_byte : last // self._codes_per_byte]
        if self._codes_per_byte == 2:
            codes = torch.stack((codes >> 4, codes & 15), dim=1).view(-1)
        levels, _ = self._table(packed["signed"], codes.device)
        if reproducibly and packed["signed"] and self.format_name != "float8":
            levels = torch.cat([levels.new_full((1,), -1.0), levels[1:]])
        values = levels[codes.int()].view(scales.numel(), self.block_size).mul_(scales.unsqueeze(1))
        return values.view(-1)[: stop - start]

    @property
    def _codes_per_byte(self) -> int:
        return 2 if self.format_name == "4-bit" else 1

    @property
    def _largest_level(self) -> float:
        return _LARGEST_FLOAT8 if self.format_name == "float8" else 1.0

    def _table(self, signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels and, for each bit pattern of a 16-bit float, the code of the nearest one.

        Kept by the codec and not by the module: made under a fake mode they are fake.
        """
        key = (signed, device)
        if key not in self._tables:
            patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(torch.float16)
            if self.format_name == "float8":
                codes = torch.arange(256, dtype=torch.uint8, device=device)
                levels, nearest = codes.view(torch.float8_e4m3fn).float(), patterns.to(torch.float8_e4m3fn)
                self._tables[key] = levels, nearest.view(torch.uint8)
            else:
                levels = torch.tensor(make_levels(self.format_name, signed), device=device)
                between = (levels[1:] + levels[:-1]) / 2
                nearest = torch.bucketize(patterns.float(), between, out_int32=True)
                self._tables[key] = levels, nearest.to(torch.uint8)
        return self._tables[key]


def make_levels(format_name: FormatName, signed: bool) -> list[float]:
    """The levels of a format in ascending order, within [-1, 1].

    Args:
        format_name: One of :data:`BLOCK_SIZES`, but for ``"float8"``, whose codes are in another order.
        signed: Whether there are negative ones; if not, zero is replaced by half of the smallest positive level in
            the formats that say no other.
    """
    if format_name == "4-bit" and not signed:
        return [step / 16 for step in range(1, 17)]
    if format_name == "fp8":
        positive = _float8_levels()
    elif format_name == "4-bit":
        positive = _dynamic_levels(decades=3, first=1)
    else:
        positive = _dynamic_levels(decades=7, first=1 if signed else 2)
    if signed:
        lowest = positive if format_name == "fp8" else positive[:-1]  # -1 has no code in the dynamic sets
        return [*(-level for level in reversed(lowest)), 0.0, *positive]
    return [0.0 if format_name == "8-bit with zero" else positive[0] / 2, *positive]


def _dynamic_levels(decades: int, first: int) -> list[float]:
    """Positive levels of the dynamic tree: each decade up to 1 is cut into twice as many as the one below it."""
    levels = []
    for decade in range(decades):
        count = first * 2**decade
        width = 0.9 / count
        levels += [10.0 ** (decade - decades + 1) * (0.1 + width * (index + 0.5)) for index in range(count)]
    return [*levels, 1.0]


def _float8_levels() -> list[float]:
    largest = 448.0
    subnormal = [mantissa * 2.0**-9 for mantissa in range(1, 8)]
    normal = [(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)]
    return [value / largest for value in (*subnormal, *normal) if value <= largest]


def as_packed(value: object) -> PackedTensor | None:
    """``value`` if it is a packed tensor, else ``None``."""
    if isinstance(value, dict) and value.keys() == PackedTensor.__annotations__.keys():
        return cast(PackedTensor, value)
    return None
