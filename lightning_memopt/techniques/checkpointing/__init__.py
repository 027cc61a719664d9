"""Activation checkpointing: drop what the backward needs and compute it again when it asks.

``policy`` says what may be asked for, ``selection`` finds the regions to recompute, ``profile`` looks at one of them
on fake tensors, ``budget`` chooses what is worth keeping, ``replay`` runs a region twice without side effects, and
``apply`` puts it all on a module and takes it off again.
"""

from lightning_memopt.techniques.checkpointing.apply import CheckpointHandle, checkpoint_activations
from lightning_memopt.techniques.checkpointing.policy import POLICIES, Recompute

__all__ = ["POLICIES", "CheckpointHandle", "Recompute", "checkpoint_activations"]
