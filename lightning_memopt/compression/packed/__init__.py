"""Weights held in few bits that modules use as dense ones."""

import torch

from lightning_memopt.compression.packed.base import PackedWeight, stored_bytes, unpickled
from lightning_memopt.compression.packed.by_torchao import TorchaoWeight
from lightning_memopt.compression.packed.floats import Float8Weight, HalfWeight, NF4Weight
from lightning_memopt.compression.packed.integers import Int4Weight, Int8Weight

PACKED: dict[str, type[PackedWeight]] = {
    "int8": Int8Weight,
    "int4": Int4Weight,
    "fp8": Float8Weight,
    "half": HalfWeight,
    "nf4": NF4Weight,
    "torchao": TorchaoWeight,
}
"""The kinds of packed weight, by the name that files have for them."""

# Checkpoints of modules that were quantized in place have them, and can be read with `weights_only=True`.
torch.serialization.add_safe_globals([unpickled, *PACKED.values()])

__all__ = [
    "PACKED",
    "Float8Weight",
    "HalfWeight",
    "Int4Weight",
    "Int8Weight",
    "NF4Weight",
    "PackedWeight",
    "TorchaoWeight",
    "stored_bytes",
]
