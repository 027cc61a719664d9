"""The predicted peak, the measured peak and the allocator's own events agree, for every module and technique."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_memopt as memopt
from tests.planning.allocator import clipping, raw_peak_bytes
from tests.zoo import ZOO

PREDICTED_WITHIN = 0.02
MEASURED_WITHIN = 0.002


@pytest.mark.parametrize("name", ZOO)
def test_the_predicted_peak_is_within_two_percent_of_the_allocators_own_events(name):
    entry = ZOO[name]
    module, batch, options = entry.build(dropout=0.1), entry.batch(), clipping(entry)
    raw = raw_peak_bytes(lambda: entry.build(dropout=0.1), entry.batch(), **options)
    predicted = memopt.predict_memory(module, batch, **options)
    measured = memopt.measure_memory(module, batch, **options)
    assert predicted.peak_bytes == pytest.approx(raw, rel=PREDICTED_WITHIN)
    assert measured.peak_bytes == pytest.approx(raw, rel=MEASURED_WITHIN)
    for report in (predicted, measured):
        assert sum(report.by_category.values()) == report.peak_bytes
        assert sum(report.by_submodule.values()) == report.peak_bytes
        assert max(point.total_bytes for point in report.timeline) == report.peak_bytes
    assert (predicted.source, measured.source) == ("predicted", "measured")


@dataclass(frozen=True)
class Technique:
    callbacks: Callable[[], list[Any]] = list
    plugins: Callable[[], list[Any]] = list
    options: tuple[tuple[str, Any], ...] = ()


TECHNIQUES = {
    "lightning_accumulation": Technique(options=(("accumulate_grad_batches", 3),)),
    "lightning_bf16": Technique(options=(("precision", "bf16-mixed"),)),
    "accumulation": Technique(lambda: [memopt.GradientAccumulation(2)]),
    "micro_batching": Technique(lambda: [memopt.MicroBatching(3)]),
    "checkpointing_full": Technique(lambda: [memopt.ActivationCheckpointing("full")]),
    "checkpointing_every_k": Technique(lambda: [memopt.ActivationCheckpointing("every_k", k=2)]),
    "checkpointing_selective": Technique(lambda: [memopt.ActivationCheckpointing("selective")]),
    "checkpointing_budget": Technique(lambda: [memopt.ActivationCheckpointing("budget", budget=0.5)]),
    "offload": Technique(lambda: [memopt.ActivationOffload(to="disk", min_bytes=1024)]),
    "optimizer_in_backward": Technique(lambda: [memopt.OptimizerInBackward()]),
    "low_bit_optimizer": Technique(lambda: [memopt.LowBitOptimizer(8)]),
    "chunked_loss": Technique(lambda: [memopt.ChunkedLoss()]),
    "mixed_bf16": Technique(plugins=lambda: [memopt.MixedPrecision("bf16")]),
    "mixed_fp16": Technique(plugins=lambda: [memopt.MixedPrecision("fp16")]),
    "half_bf16": Technique(plugins=lambda: [memopt.HalfPrecision("bf16", rounding="nearest")]),
    "half_bf16_kahan": Technique(plugins=lambda: [memopt.HalfPrecision("bf16", rounding="kahan")]),
}
"""Every technique, as a user writes it; a new one is a row here."""

KERNELS_THAT_ALLOCATE = ("cnn", "lstm")
QUICK = [("gpt2", technique) for technique in TECHNIQUES] + [
    (name, technique)
    for name in KERNELS_THAT_ALLOCATE
    for technique in ("micro_batching", "checkpointing_full", "mixed_bf16", "half_bf16")
]


def _assert_predicted(name: str, technique: str) -> None:
    entry, chosen = ZOO[name], TECHNIQUES[technique]
    # Large enough to drown the random state that each checkpoint keeps, which a prediction does not see.
    batch = entry.batch(batch_size=8 if technique == "micro_batching" else 24)
    options = dict(chosen.options)
    raw = raw_peak_bytes(entry.build, batch, chosen.callbacks(), chosen.plugins(), **options)
    predicted = memopt.predict_memory(
        entry.build(), batch, callbacks=chosen.callbacks(), plugins=chosen.plugins(), **options
    )
    assert predicted.peak_bytes == pytest.approx(raw, rel=PREDICTED_WITHIN)


@pytest.mark.parametrize(("name", "technique"), QUICK)
def test_with_a_technique_on_the_predicted_peak_is_still_within_two_percent(name, technique):
    _assert_predicted(name, technique)


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("name", ZOO)
def test_every_technique_on_every_module_is_predicted_within_two_percent_or_refused_by_both(name, technique):
    try:
        _assert_predicted(name, technique)
    except MisconfigurationException as refusal:
        chosen = TECHNIQUES[technique]
        with pytest.raises(MisconfigurationException) as predicted:
            memopt.predict_memory(
                ZOO[name].build(), ZOO[name].batch(), callbacks=chosen.callbacks(), plugins=chosen.plugins()
            )
        assert type(predicted.value) is type(refusal)
