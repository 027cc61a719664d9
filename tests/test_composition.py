"""Every pair of techniques: the same training, or a refusal that names both."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_memopt as memopt
from tests.parity import Run, assert_same_training, train
from tests.zoo import ZOO, slow_where


@dataclass(frozen=True)
class Technique:
    """One technique as a user writes it.

    Attributes:
        callbacks: Makes its callbacks.
        plugins: Makes its precision plugins.
        exact: Whether it keeps the numbers of the run that it is added to; the others change them by design
            (a larger effective batch, fewer bits) and are compared within ``TOLERANCE``.
    """

    callbacks: Callable[[], list[Any]] = list
    plugins: Callable[[], list[Any]] = list
    exact: bool = True

    def options(self) -> dict[str, Any]:
        return {"callbacks": self.callbacks(), "plugins": self.plugins()}


TOLERANCE = 0.02
"""Relative difference allowed between the mean losses of two runs of which one computes in fewer bits."""

TECHNIQUES = {
    "accumulation": Technique(lambda: [memopt.GradientAccumulation(2)], exact=False),
    "micro_batching": Technique(lambda: [memopt.MicroBatching(3)]),
    "checkpointing_full": Technique(lambda: [memopt.ActivationCheckpointing("full")]),
    "checkpointing_every_k": Technique(lambda: [memopt.ActivationCheckpointing("every_k", k=2)]),
    "checkpointing_selective": Technique(lambda: [memopt.ActivationCheckpointing("selective")]),
    "checkpointing_budget": Technique(lambda: [memopt.ActivationCheckpointing("budget", budget=0.5)]),
    "offload": Technique(lambda: [memopt.ActivationOffload(to="disk", min_bytes=1024)]),
    "optimizer_in_backward": Technique(lambda: [memopt.OptimizerInBackward()]),
    "low_bit_optimizer": Technique(lambda: [memopt.LowBitOptimizer(8)], exact=False),
    "low_bit_bitsandbytes": Technique(lambda: [memopt.LowBitOptimizer(8, engine="bitsandbytes")], exact=False),
    "chunked_loss": Technique(lambda: [memopt.ChunkedLoss()]),
    "gradual_pruning": Technique(lambda: [memopt.GradualPruning(memopt.ConstantSparsity(0.3))], exact=False),
    "monitor": Technique(lambda: [memopt.MemoryMonitor(every_n_steps=5)]),
    "mixed_bf16": Technique(plugins=lambda: [memopt.MixedPrecision("bf16")], exact=False),
    "mixed_fp16": Technique(plugins=lambda: [memopt.MixedPrecision("fp16")], exact=False),
    "half_bf16": Technique(plugins=lambda: [memopt.HalfPrecision("bf16", rounding="kahan")], exact=False),
}

REFUSED = {
    ("accumulation", "optimizer_in_backward"): "OptimizerInBackward.*GradientAccumulation",
    ("micro_batching", "optimizer_in_backward"): "OptimizerInBackward.*MicroBatching",
    ("optimizer_in_backward", "mixed_fp16"): "OptimizerInBackward.*(fp16|scal)",
    ("mixed_bf16", "mixed_fp16"): "Precision",
    ("mixed_bf16", "half_bf16"): "Precision",
    ("mixed_fp16", "half_bf16"): "Precision",
    **dict.fromkeys(combinations((n for n in TECHNIQUES if "checkpointing" in n), 2), "ActivationCheckpointing"),
}
"""Pairs that cannot be, and what their error says."""


def _train(*techniques: Technique) -> Run:
    entry = ZOO["gpt2"]
    options: dict[str, Any] = {"callbacks": [], "plugins": []}
    for technique in techniques:
        for key, values in technique.options().items():
            options[key] += values
    return train(entry.build(), entry.loader(batches=16), steps=8, **options)


_alone: dict[str, Run] = {}


def _train_alone(name: str) -> Run:
    if name not in _alone:
        _alone[name] = _train(TECHNIQUES[name])
    return _alone[name]


TWO_OF_ONE = ("low_bit_optimizer", "low_bit_bitsandbytes")
"""Lightning takes no two callbacks of one class that both have state."""

PAIRS = [pair for pair in combinations(TECHNIQUES, 2) if pair != TWO_OF_ONE]
SLOW = [
    pair
    for pair in PAIRS
    if ("monitor" in pair and "low_bit_optimizer" not in pair) or "low_bit_bitsandbytes" in pair
]


@pytest.mark.parametrize(("first", "second"), slow_where(PAIRS, SLOW))
def test_a_pair_of_techniques_trains_as_one_of_them_alone_or_is_refused_by_name(first, second):
    if refusal := REFUSED.get((first, second)):
        with pytest.raises(MisconfigurationException) as error:
            _train(TECHNIQUES[first], TECHNIQUES[second])
        assert re.search(refusal, str(error.value), re.DOTALL)
        return

    both = _train(TECHNIQUES[first], TECHNIQUES[second])
    exact = TECHNIQUES[first].exact or TECHNIQUES[second].exact
    reference = second if TECHNIQUES[first].exact else first
    alone = _train_alone(reference)
    if exact and reference not in ("mixed_bf16", "mixed_fp16", "half_bf16", *TWO_OF_ONE):
        # A key's bias has no gradient but rounding errors, which AdamW scales up to the learning rate.
        assert_same_training(alone, both, atol=1e-5)
    else:
        assert list(both.weights) == list(alone.weights)
        mean, expected = torch.tensor(both.losses).mean(), torch.tensor(alone.losses).mean()
        assert abs(mean - expected) <= TOLERANCE * expected
