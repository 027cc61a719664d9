"""Single-device techniques inside data parallel training: the numbers of one device, or a refusal by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.strategies.parity import fit_zoo
from tests.zoo import ZOO

IN_BACKWARD = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
"""What it needs: gradients are used one by one, and once."""

TECHNIQUES: dict[str, Callable[[], dict[str, Any]]] = {
    "checkpointing_full": lambda: {"extra": [memopt.ActivationCheckpointing("full")]},
    "checkpointing_selective": lambda: {"extra": [memopt.ActivationCheckpointing("selective")]},
    "offload": lambda: {"extra": [memopt.ActivationOffload(to="disk", min_bytes=1024)]},
    "accumulation": lambda: {"extra": [memopt.GradientAccumulation(2)], "accumulate_grad_batches": 1},
    "micro_batching": lambda: {"extra": [memopt.MicroBatching(2)]},
    "chunked_loss": lambda: {"extra": [memopt.ChunkedLoss()]},
    "monitor": lambda: {"extra": [memopt.MemoryMonitor(every_n_steps=2)]},
    "mixed_bf16": lambda: {"plugins": [memopt.MixedPrecision("bf16")]},
    "mixed_fp16": lambda: {"plugins": [memopt.MixedPrecision("fp16")]},
    "half_bf16": lambda: {"plugins": [memopt.HalfPrecision("bf16")]},
    "low_bit": lambda: {"extra": [memopt.LowBitOptimizer(8)]},
    "optimizer_in_backward": lambda: {"extra": [memopt.OptimizerInBackward()], **IN_BACKWARD},
    "optimizer_in_backward_and_chunked_loss": lambda: {
        "extra": [memopt.OptimizerInBackward(), memopt.ChunkedLoss(), memopt.ActivationCheckpointing("full")],
        **IN_BACKWARD,
    },
}
TOLERANCE = {"mixed_bf16": 1e-3, "mixed_fp16": 1e-4, "half_bf16": 1e-3, "low_bit": 1e-4}
FEW = ("checkpointing_full", "micro_batching", "mixed_fp16")
OF_REPLICAS = tuple(name for name in TECHNIQUES if "in_backward" not in name)


@pytest.mark.parametrize(
    ("strategy", "techniques"),
    [
        pytest.param("memopt_zero3", FEW, id="few"),
        pytest.param("memopt_ddp", OF_REPLICAS, id="memopt_ddp", marks=pytest.mark.slow),
        *(
            pytest.param(name, tuple(TECHNIQUES), id=name, marks=pytest.mark.slow)
            for name in ("memopt_zero1", "memopt_zero2", "memopt_zero3", "memopt_hybrid")
        ),
    ],
)
def test_each_technique_gives_the_losses_of_one_device(strategy, techniques):
    def losses(ranks: int, strategy: str) -> dict[str, np.ndarray]:
        fits = {name: {"strategy": strategy, **TECHNIQUES[name]()} for name in techniques}
        return {name: fit_zoo(ZOO["gpt2"], ranks, 4, **options).losses for name, options in fits.items()}

    one_device = run_on_ranks(lambda: losses(1, "auto"), 1, deadline_seconds=120)[0]
    two_ranks = run_on_ranks(lambda: losses(2, strategy), 2, deadline_seconds=240)[0]
    for name, expected in one_device.items():
        np.testing.assert_allclose(two_ranks[name], expected, rtol=TOLERANCE.get(name, 1e-5), err_msg=name)


def test_what_frees_gradients_one_by_one_refuses_buckets_that_hold_all_by_name():
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match=r"OptimizerInBackward .* DataParallelStrategy .*zero3"):
            fit_zoo(ZOO["gpt2"], 2, 1, strategy="memopt_ddp", extra=[memopt.OptimizerInBackward()], **IN_BACKWARD)

    run_on_ranks(fit, 2)
