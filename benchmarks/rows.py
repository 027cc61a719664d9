"""The rows of the single-device table: what is switched on, what it must reach, and what limits it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning_memopt as memopt

Quantity = Literal["activations+temporaries", "gradients", "optimizer_state", "peak"]
"""What a row's memory target is about.

``activations+temporaries`` is all that is neither model nor optimizer at the moment of each run's peak: a target for
activations that leaves out what recomputing them needs would flatter checkpointing. ``gradients`` and
``optimizer_state`` are the highest over the step, since gradients may be cleared when the peak comes.
"""


@dataclass(frozen=True)
class Row:
    """One technique, or several together.

    Attributes:
        title: As the table says it.
        options: Trainer options that switch it on; called once per run, since callbacks hold a run's state.
        quantity: What the memory target is about.
        memory_target: Highest ratio to plain Lightning allowed; ``None`` to report only.
        time_target: Highest ratio of step times allowed, or the row that it must stay below; ``None`` to report.
        vocabulary: Which size it runs at.
        limit: What keeps the figures from being better.
    """

    title: str
    options: Callable[[], dict[str, Any]] = field(default=dict)
    quantity: Quantity = "peak"
    memory_target: float | None = None
    time_target: float | str | None = None
    vocabulary: int = 256
    limit: str = ""


def _callbacks(*make: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {"callbacks": [one() for one in make]}


def _plugins(*make: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {"plugins": [one() for one in make]}


def _checkpointing(policy: str, **options: Any) -> Callable[[], Any]:
    return lambda: memopt.ActivationCheckpointing(policy, **options)


ALL_TOGETHER: Sequence[Callable[[], Any]] = (
    lambda: memopt.MicroBatching(1),
    _checkpointing("full"),
    lambda: memopt.ChunkedLoss(),
    lambda: memopt.LowBitOptimizer(8),
)

ROWS: dict[str, Row] = {
    "plain": Row("plain Lightning"),
    "plain_32768": Row("plain Lightning, vocabulary 32768", vocabulary=32768),
    "checkpointing_full": Row(
        "checkpointing, full", _callbacks(_checkpointing("full")), "activations+temporaries", 0.13, 1.35,
        limit="the block inputs that are kept, and the one block that is being recomputed",
    ),
    "checkpointing_every_k": Row(
        "checkpointing, every 2nd block", _callbacks(_checkpointing("every_k", k=2)), "activations+temporaries",
        limit="every second block keeps all that it saves",
    ),
    "checkpointing_selective": Row(
        "checkpointing, selective", _callbacks(_checkpointing("selective")), "activations+temporaries", 0.60, 1.12,
        limit="the matrix products' results, which are kept",
    ),
    "checkpointing_budget": Row(
        "checkpointing, budget 0.4", _callbacks(_checkpointing("budget", budget=0.4)), "activations+temporaries",
        0.40, "checkpointing_full",
        limit="the budget is of the blocks' activations; what surrounds the blocks and temporaries come on top",
    ),
    "micro_batching": Row(
        "16 micro-batches of 1", _callbacks(lambda: memopt.MicroBatching(1)), "activations+temporaries", 0.08, 1.5,
        limit="one sample's activations; matrix products of one sample are slower",
    ),
    "optimizer_in_backward": Row(
        "OptimizerInBackward", _callbacks(lambda: memopt.OptimizerInBackward()), "gradients", 0.10, 1.05,
        limit="the largest parameter's gradient; the peak itself is at the end of the forward and hardly moves",
    ),
    "low_bit": Row(
        "LowBitOptimizer(8)", _callbacks(lambda: memopt.LowBitOptimizer(8)), "optimizer_state", 0.27,
        limit="one scale a block of values, and small tensors in fp32; the peak is made of activations",
    ),
    "chunked_loss": Row(
        "ChunkedLoss, vocabulary 32768", _callbacks(lambda: memopt.ChunkedLoss()), "activations+temporaries", 0.37,
        1.10, vocabulary=32768,
        limit="the blocks' activations, which it leaves alone",
    ),
    "offload": Row(
        "ActivationOffload to disk", _callbacks(lambda: memopt.ActivationOffload("disk")), "activations+temporaries",
        limit="temporaries of the backward; the disk's speed",
    ),
    "mixed_precision": Row(
        "MixedPrecision(\"bf16\")", _plugins(lambda: memopt.MixedPrecision("bf16")), "peak",
        limit="parameters, gradients and optimizer state stay fp32, and so does what autocast keeps in fp32",
    ),
    "half_precision": Row(
        "HalfPrecision(\"bf16\")", _plugins(lambda: memopt.HalfPrecision("bf16")), "peak",
        limit="optimizer state stays fp32",
    ),
    "all_together": Row(
        "all together", _callbacks(*ALL_TOGETHER), "peak", 0.12,
        limit="parameters and the gradients that micro-batches add up, both fp32",
    ),
    "all_together_32768": Row(
        "all together, vocabulary 32768", _callbacks(*ALL_TOGETHER), "peak", 0.10, vocabulary=32768,
        limit="parameters and the gradients that micro-batches add up, both fp32",
    ),
}  # fmt: skip


def plain_of(row: Row) -> str:
    """Name of the row that ``row`` is compared to."""
    return "plain" if row.vocabulary == 256 else f"plain_{row.vocabulary}"
