"""Families that nobody developed against: what one device offers trains and predicts them, or refuses by name."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_memopt as memopt
from tests.parity import Run, assert_same_training, train
from tests.planning.a_cpu import A_CPU
from tests.planning.allocator import clipping, raw_peak_bytes
from tests.zoo.architectures import ARCHITECTURES

pytestmark = pytest.mark.slow

LANGUAGE_MODELS = [
    "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "cohere", "stablelm", "mixtral", "qwen3_moe", "gpt_oss",
    "gpt_neox", "opt", "bloom", "falcon", "mpt", "gptj", "gpt_bigcode", "mamba2", "roberta", "albert", "modernbert",
    "bart", "marian", "whisper",
]  # fmt: skip
SHIFTED_AND_PADDED = ["qwen2", "opt", "bloom"]
PADDED = ["roberta", "albert", "modernbert"]
POLICIES = {"full": {}, "every_k": {"k": 2}, "selective": {}, "budget": {"budget": 0.5}}
CLOSE = {
    "low_bit": lambda: {"callbacks": [memopt.LowBitOptimizer(8)]},
    "mixed_bf16": lambda: {"plugins": [memopt.MixedPrecision("bf16")]},
    "half_bf16": lambda: {"plugins": [memopt.HalfPrecision("bf16", rounding="nearest")]},
}
"""What rounds, and so trains nearly the same."""


def _train(name: str, dropout: float = 0.0, batch_size: int = 8, steps: int = 3, **options: Any) -> Run:
    entry = ARCHITECTURES[name]
    loader = entry.loader(steps * 8 // batch_size, batch_size)
    return train(entry.build(dropout), loader, steps=steps, **({"gradient_clip_val": 0.5} | options))


def _counted(name: str) -> dict[str, Any]:
    """How a user says what the loss is a mean over."""
    if name in SHIFTED_AND_PADDED:
        return {"normalize": "tokens", "count": lambda batch: (batch["labels"][:, 1:] != -100).sum()}
    return {"normalize": "tokens", "mask_key": "labels"} if name in PADDED else {"normalize": "samples"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_peak_is_predicted_within_two_percent_and_measured_within_two_thousandths(name):
    entry = ARCHITECTURES[name]
    raw = raw_peak_bytes(entry.build, entry.batch(), **clipping(entry))
    predicted = memopt.predict_memory(entry.build(), entry.batch(), **clipping(entry))
    measured = memopt.measure_memory(entry.build(), entry.batch(), **clipping(entry))
    assert predicted.peak_bytes == pytest.approx(raw, rel=0.02)
    assert measured.peak_bytes == pytest.approx(raw, rel=0.002)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_policy_of_checkpointing_finds_blocks_and_trains_the_same_bit_for_bit_with_dropout(name, caplog):
    plain = _train(name, dropout=0.1)
    for policy, options in POLICIES.items():
        run = _train(name, dropout=0.1, callbacks=[memopt.ActivationCheckpointing(policy, **options)])
        assert_same_training(plain, run, rtol=0, atol=0)
    assert "cannot be profiled" not in caplog.text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_checkpointing_takes_activations_off_the_peak_as_predicted(name):
    entry = ARCHITECTURES[name]
    plain = memopt.predict_memory(entry.build(), entry.batch())
    full = memopt.predict_memory(entry.build(), entry.batch(), callbacks=[memopt.ActivationCheckpointing("full")])
    raw = raw_peak_bytes(entry.build, entry.batch(), [memopt.ActivationCheckpointing("full")])
    assert full.peak_bytes == pytest.approx(raw, rel=0.02)
    most_plain, most_full = (max(p.by_category["activations"] for p in each.timeline) for each in (plain, full))
    assert most_full < 0.85 * most_plain


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if not entry.has_batch_norm])
def test_micro_batches_and_accumulated_batches_train_as_the_whole(name):
    plain, counted = _train(name), _counted(name)
    for size in (4, 2):
        run = _train(name, callbacks=[memopt.MicroBatching(size, **counted)])
        assert_same_training(plain, run, rtol=1e-4, atol=1e-5)
    run = _train(name, batch_size=4, callbacks=[memopt.GradientAccumulation(2, **counted)])
    assert_same_training(plain, run, rtol=1e-4, atol=1e-5, compare_losses=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_chunked_loss_is_that_of_every_language_model_and_refused_of_all_else(name, monkeypatch):
    from lightning_memopt.techniques import lazy_logits

    chunked, calls = lazy_logits.chunked_cross_entropy_of_transformed_logits, []

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return chunked(*args, **kwargs)

    monkeypatch.setattr(lazy_logits, "chunked_cross_entropy_of_transformed_logits", counting)
    if name not in LANGUAGE_MODELS:
        with pytest.raises(MisconfigurationException, match="found no Hugging Face model with a language-model head"):
            _train(name, callbacks=[memopt.ChunkedLoss()])
        return
    run = _train(name, callbacks=[memopt.ChunkedLoss()])
    assert_same_training(_train(name), run, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_offloaded_activations_and_steps_within_the_backward_train_the_same_bit_for_bit(name):
    offload = memopt.ActivationOffload(to="disk", min_bytes=1024)
    assert_same_training(_train(name, 0.1), _train(name, 0.1, callbacks=[offload]), rtol=0, atol=0)
    plain = _train(name, gradient_clip_val=None)
    in_backward = _train(name, gradient_clip_val=None, callbacks=[memopt.OptimizerInBackward()])
    assert_same_training(plain, in_backward, rtol=0, atol=0)


@pytest.mark.parametrize("technique", CLOSE)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_rounds_starts_from_nearly_the_same_loss_and_stays_finite(name, technique):
    plain, run = _train(name), _train(name, **CLOSE[technique]())
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=0.02)
    assert all(tensor.isfinite().all() for tensor in run.weights.values())
    assert list(run.weights) == list(plain.weights)


@pytest.mark.parametrize("name", ["mixtral", "whisper", "convnext", "wav2vec2", "gemma2"])
def test_a_plan_fits_its_budget_when_it_is_run(name):
    entry = ARCHITECTURES[name]
    budget = int(0.9 * memopt.predict_memory(entry.build(), entry.batch()).peak_bytes)
    best = memopt.plan(entry.build(), entry.batch(), budget=budget, device=A_CPU).best
    raw = raw_peak_bytes(entry.build, entry.batch(), best.callbacks())
    assert raw <= budget
    assert best.peak_bytes == pytest.approx(raw, rel=0.02)
