"""The predicted peak, the measured peak and the allocator's own events agree, for every module and technique."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_memopt as memopt
from lightning_memopt.memory.report import MemoryReport
from tests.planning.allocator import clipping, raw_peak_bytes
from tests.zoo import ZOO, cases

PREDICTED_WITHIN = 0.02
MEASURED_WITHIN = 0.002


@pytest.mark.parametrize("name", cases())
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
    "low_bit_bitsandbytes": Technique(lambda: [memopt.LowBitOptimizer(8, engine="bitsandbytes")]),
    "chunked_loss": Technique(lambda: [memopt.ChunkedLoss()]),
    "mixed_bf16": Technique(plugins=lambda: [memopt.MixedPrecision("bf16")]),
    # A scale that overflows skips its first steps, and then no optimizer has state yet.
    "mixed_fp16": Technique(plugins=lambda: [memopt.MixedPrecision("fp16", initial_scale=256.0)]),
    "half_bf16": Technique(plugins=lambda: [memopt.HalfPrecision("bf16", rounding="nearest")]),
    "half_bf16_kahan": Technique(plugins=lambda: [memopt.HalfPrecision("bf16", rounding="kahan")]),
}
"""Every technique, as a user writes it; a new one is a row here."""

WITHOUT_LANGUAGE_MODEL = {
    *("mlp", "metrics_mlp", "late_mlp", "encoder", "lstm", "shared_block", "gan", "bert_qa", "cnn", "vit"),
}
REFUSED = {
    *((name, "chunked_loss") for name in WITHOUT_LANGUAGE_MODEL),
    *(
        ("gan", each)
        for each in ("accumulation", "lightning_accumulation", "micro_batching", "optimizer_in_backward")
    ),
    ("lstm", "mixed_fp16"),
}
"""Which modules a technique refuses, in training as in prediction."""

QUICK = [("late_mlp", technique) for technique in TECHNIQUES] + [
    ("cnn", "checkpointing_selective"),
    ("gpt2", "checkpointing_selective"),
    ("gpt2", "chunked_loss"),
    ("lstm", "micro_batching"),
    ("lstm", "mixed_fp16"),
]


def _assert_predicted(name: str, technique: str) -> None:
    entry, chosen = ZOO[name], TECHNIQUES[technique]
    options = dict(chosen.options)

    def predict() -> MemoryReport:
        return memopt.predict_memory(
            entry.build(), entry.batch(), callbacks=chosen.callbacks(), plugins=chosen.plugins(), **options
        )

    try:
        raw = raw_peak_bytes(entry.build, entry.batch(), chosen.callbacks(), chosen.plugins(), **options)
    except MisconfigurationException as refusal:
        assert (name, technique) in REFUSED or "is an nn.LSTM" in str(refusal), refusal
        with pytest.raises(MisconfigurationException, match=re.escape(str(refusal))):
            predict()
        return
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
        pytest.skip(f"{name} does not train with {technique} on this CPU: {error}")
    assert (name, technique) not in REFUSED
    assert predict().peak_bytes == pytest.approx(raw, rel=PREDICTED_WITHIN)


@pytest.mark.parametrize(("name", "technique"), QUICK)
def test_with_a_technique_on_the_predicted_peak_is_still_within_two_percent(name, technique):
    _assert_predicted(name, technique)


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("name", cases())
def test_every_technique_on_every_module_is_predicted_within_two_percent_or_refused_by_both(name, technique):
    _assert_predicted(name, technique)
