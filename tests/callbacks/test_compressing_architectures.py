"""The callbacks that compress, on what users bring: a few steps each, and what is written read back bit by bit."""

from functools import partial

import pytest
import torch

from lightning_memopt import (
    ClusterWeights,
    GradualPruning,
    PolynomialSparsity,
    PruneOnFitEnd,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
    load_compressed,
)
from lightning_memopt.compression.container import save_compressed
from lightning_memopt.compression.masks import prune_weights
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.selection import select_weights
from tests.parity import quiet_trainer
from tests.zoo import slow_where
from tests.zoo.architectures import ARCHITECTURES

SLOW = [name for name in ARCHITECTURES if name not in ("mixtral", "wav2vec2")]

ALL = slow_where(list(ARCHITECTURES), SLOW)


def _fit(name, callback):
    entry = ARCHITECTURES[name]
    module = entry.build()
    trainer = quiet_trainer(4, callback, val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    trainer.fit(module, entry.loader(4, 4), entry.loader(1, 4, seed=1))
    return module


def _share(module):
    weights = [weight.parameter for weight in select_weights(module).weights]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def _assert_read_back(name, module, folder):
    loaded = load_compressed(save_compressed(module, folder), partial(ARCHITECTURES[name].build, seed=1))
    states = (module.state_dict(), loaded.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        other = states[1][key]
        pairs = [(value, other)]
        if isinstance(value, PackedWeight):
            pairs = list(zip(value.plain().parts.values(), other.plain().parts.values(), strict=True))
        assert all(torch.equal(one, two) for one, two in pairs), key


@pytest.mark.parametrize("name", ALL)
def test_half_of_the_weights_is_pruned_by_every_method_and_pattern(name, tmp_path):
    for how in ({}, {"scope": "global"}, {"method": "random"}, {"pattern": "2:4"}, {"pattern": "4x1"}):
        module = ARCHITECTURES[name].build()
        masks = prune_weights(module, 0.5, **how)
        pruned = [weight.parameter for weight in masks.weights.values()]
        zeros = sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned)
        assert zeros == pytest.approx(0.5, abs=0.01)
        assert all("does not divide" in why or "do not divide" in why for why in _other_reasons(masks))
    _assert_read_back(name, module, tmp_path / "net")


def _other_reasons(masks):
    """Why weights are left that are neither vectors nor embeddings, nor of modules that are not known."""
    return [
        why
        for why in masks.skipped.values()
        if not any(part in why for part in ("vector", "embedding", "not known", "parametrization"))
    ]


@pytest.mark.parametrize("name", ALL)
def test_zeros_grow_by_saliency_and_values_are_shared_while_architectures_train(name, tmp_path):
    pruning = GradualPruning(PolynomialSparsity(0.0, 0.6, begin_step=2, end_step=4, frequency=1), "saliency")
    module = _fit(name, pruning)
    assert _share(module) == pytest.approx(0.6, abs=0.01) == pruning.report.eligible_sparsity
    assert pruning.report.metrics_before.keys() == pruning.report.metrics_after.keys() == {"val_loss"}
    clustering = ClusterWeights(8, begin_step=2)
    module = _fit(name, clustering)
    assert max(len(weight.parameter.unique()) for weight in select_weights(module).weights) <= 8
    _assert_read_back(name, module, tmp_path / "net")


@pytest.mark.parametrize("name", ALL)
def test_architectures_are_quantized_with_ranges_that_were_seen_and_made_smaller_when_they_are_trained(
    name, tmp_path
):
    for callback in (
        QuantizeOnFitEnd("int8_static", export_path=tmp_path / "net"),
        QuantizationAwareTraining("nf4", start_step=1),
    ):
        module = _fit(name, callback)
        before, after = callback.report.metrics_before["val_loss"], callback.report.metrics_after["val_loss"]
        assert callback.report.ratio < 0.4
        assert after == pytest.approx(before, rel=0.5 if name == "mobilenet_v2" else 0.1)  # of 25 small convolutions
        assert not any(isinstance(parameter, PackedWeight) for parameter in module.parameters())
    assert load_compressed(tmp_path / "net", ARCHITECTURES[name].build()) is not None
    structured = PruneOnFitEnd(0.3, "structured")
    _fit(name, structured)
    assert structured.report.ratio < 0.8 and structured.report.metrics_after.keys() == {"val_loss"}
