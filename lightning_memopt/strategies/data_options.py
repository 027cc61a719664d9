"""The arguments of the data parallel strategy: what is possible, and what it stands for in torch."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy

SHARDS = ("none", "optimizer", "gradients", "parameters")


def check_arguments(shard: str, offload: bool, compression: str | None, hook: Callable[..., Any] | None) -> None:
    """Refuse values that are not known and pairs that mean nothing together.

    Raises:
        MisconfigurationException: Says which, and what is possible.
    """
    if shard not in SHARDS:
        raise MisconfigurationException(
            f"DataParallelStrategy(shard={shard!r}) is not known; choose one of {', '.join(map(repr, SHARDS))}."
        )
    if offload and shard == "none":
        raise MisconfigurationException(
            "DataParallelStrategy(offload=True) with shard='none' has nothing to offload: replicas stay on their "
            "devices; choose shard='optimizer', 'gradients' or 'parameters'."
        )
    if compression not in (None, *compression_hooks()):
        raise MisconfigurationException(
            f"DataParallelStrategy(compression={compression!r}) is not known; choose 'bf16', 'fp16' or None."
        )
    if compression and shard != "none":
        raise MisconfigurationException(
            f"DataParallelStrategy(compression={compression!r}) with shard={shard!r}: only the gradients of replicas "
            "(shard='none') are compressed; a mixed-precision plugin gathers sharded parameters in 16 bits."
        )
    if hook is not None and (compression or shard != "none"):
        raise MisconfigurationException(
            f"DataParallelStrategy(ddp_comm_hook=...) with shard={shard!r} and compression={compression!r}: one hook "
            "takes the gradients, and only those of replicas; leave it out, or the other two."
        )


def mixed_precision_policy(precision: Precision) -> MixedPrecisionPolicy:
    """Gather in 16 bits what autocast would cast anyway, and reduce gradients in 32.

    Inputs are left alone: autocast casts them per operation, as on one device.
    """
    gathered = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(precision.precision))
    stores_half = str(precision.precision) in ("bf16-true", "16-true")
    return MixedPrecisionPolicy(
        param_dtype=gathered,
        reduce_dtype=torch.float32 if gathered or stores_half else None,
        cast_forward_inputs=False,
    )


def compression_hooks() -> dict[str, Callable[..., Any]]:
    """DDP's communication hooks by the name of what gradients are sent as."""

    def bf16(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        # Under its own name DDP refuses it without NCCL; gloo reduces bf16 as well.
        return bf16_compress_hook(state, bucket)

    return {"bf16": bf16, "fp16": fp16_compress_hook}
