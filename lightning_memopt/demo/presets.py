"""Sizes of the demo and the names of its techniques; importing this file loads nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One size of the demo.

    Attributes:
        layers: Transformer blocks.
        width: Size of the residual stream.
        heads: Attention heads.
        context: Bytes in one training window.
        batch_size: Windows in one batch.
        micro_batch_size: Windows in one micro-batch, where the batch is split.
        steps: Optimizer steps of each run, unless the user says otherwise.
        validation_batches: Batches of the held-out files that the validation loss is averaged over.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    micro_batch_size: int
    steps: int
    validation_batches: int


PRESETS = {
    "tiny": Preset(2, 64, 2, 64, 8, 2, 20, 2),
    "small": Preset(6, 384, 6, 128, 16, 4, 40, 8),
    "medium": Preset(12, 512, 8, 256, 16, 4, 200, 16),
}
"""``small`` has about 10 million parameters and takes at most four minutes on two cores; ``medium`` about 40."""

TECHNIQUES = ("checkpointing", "micro-batching", "low-bit")
"""What ``--techniques`` accepts, in the order in which the demo lists them."""
