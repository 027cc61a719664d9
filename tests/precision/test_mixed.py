import copy
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_memopt import GradientAccumulation, MixedPrecision
from lightning_memopt.precision.loss_scale import LossScale, LossScaleCollapsedError
from tests.parity import assert_same_training, train
from tests.zoo import ZOO, cases

# Of the loss, in 8 steps: float32 has 24 bits, autocast computes in 11 (fp16) or 8 bits (bf16).
TOLERANCE = {"fp16": 0.005, "bf16": 0.03}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", cases(only_automatic=True))
def test_every_module_of_the_zoo_trains_as_in_float32_within_the_precision_of_the_format(name, dtype):
    entry = ZOO[name]
    options = {"steps": 8, "gradient_clip_val": 0.5}
    plain = train(entry.build(), entry.loader(), **options)
    plugin = MixedPrecision(dtype, initial_scale=256.0)  # low enough that no step overflows and is skipped
    try:
        mixed = train(entry.build(), entry.loader(), plugins=[plugin], **options)
    except MisconfigurationException as error:
        assert name == "lstm" and "lstm is an nn.LSTM" in str(error)  # not every processor has the kernels
        return
    assert list(mixed.weights) == list(plain.weights)
    losses, expected = torch.tensor(mixed.losses), torch.tensor(plain.losses)
    assert ((losses - expected).abs() <= TOLERANCE[dtype] * expected.abs().clamp(min=1)).all()


class _Logger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append(metrics)


class _Overflows(type(ZOO["mlp"].build())):
    """Its loss overflows fp16's gradients in the steps listed."""

    overflowing = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_step in self.overflowing else loss


def _overflowing(*steps):
    module = _Overflows(0.0)
    module.load_state_dict(ZOO["mlp"].build().state_dict())
    module.overflowing = steps
    return module


def test_a_step_that_overflows_is_skipped_and_the_scale_halved_and_both_are_logged():
    logger, plugin = _Logger(), MixedPrecision("fp16", initial_scale=1024.0)
    run = train(
        _overflowing(1, 2), ZOO["mlp"].loader(), steps=5, plugins=[plugin], logger=logger, log_every_n_steps=1
    )
    values = {
        name: [metrics[name] for metrics in logger.logged if name in metrics]
        for name in ("precision/loss_scale", "precision/skipped_steps")
    }
    assert values["precision/loss_scale"] == [1024.0, 1024.0, 512.0, 256.0, 256.0]
    assert values["precision/skipped_steps"] == [0.0, 0.0, 1.0, 2.0, 2.0]
    assert run.trainer.callback_metrics["precision/skipped_steps"] == 2
    assert all(weight.isfinite().all() for weight in run.weights.values())
    assert run.trainer.global_step == 5


def test_a_skipped_step_leaves_the_weights_alone():
    module = _overflowing(0)
    before = copy.deepcopy(module.state_dict())
    run = train(module, ZOO["mlp"].loader(1), steps=1, plugins=[MixedPrecision("fp16")])
    assert all(torch.equal(before[name], weight) for name, weight in run.weights.items())


def test_a_scale_that_collapses_is_an_error_that_names_gradients_causes_and_remedies():
    module = _overflowing(*range(100))
    with pytest.raises(LossScaleCollapsedError) as error:
        train(module, ZOO["mlp"].loader(100), steps=100, plugins=[MixedPrecision("fp16", initial_scale=4.0)])
    message = str(error.value)
    first = next(name for name, _ in module.named_parameters())
    assert re.search(rf"collapsed to \d\.\de-0\d after 16 skipped steps.*{re.escape(first)}", message)
    assert "learning rate" in message and "MixedPrecision('bf16')" in message and "no weights" in message


def test_the_scale_doubles_after_the_growth_interval():
    plugin = MixedPrecision("fp16", initial_scale=8.0, growth_interval=2)
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=5, plugins=[plugin])
    assert plugin.state_dict()["scale"] == 32.0


class _Fused(type(ZOO["mlp"].build())):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


class _NotFused(type(ZOO["mlp"].build())):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("module_class", [_Fused, _NotFused])
def test_clipping_by_norm_acts_on_unscaled_gradients_whatever_the_scale(module_class):
    runs = []
    for scale in (1.0, 2.0**12):
        module = module_class(0.0)
        module.load_state_dict(ZOO["mlp"].build().state_dict())
        plugin = MixedPrecision("fp16", initial_scale=scale)
        runs.append(train(module, ZOO["mlp"].loader(), steps=6, plugins=[plugin], gradient_clip_val=1e-3))
    assert_same_training(*runs, rtol=1e-3, atol=1e-4)


def test_accumulated_gradients_are_unscaled_once():
    runs = []
    for scale in (1.0, 2.0**12):
        plugin = MixedPrecision("fp16", initial_scale=scale)
        runs.append(
            train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=5, plugins=[plugin], accumulate_grad_batches=4)
        )
    assert_same_training(*runs, rtol=1e-3, atol=1e-4)


class _TwoOptimizersOneBackward(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizers = self.optimizers()
        self.manual_backward(F.cross_entropy(self.second(self.first(x)), y))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]


def test_two_optimizers_that_share_a_backward_unscale_by_the_same_scale():
    loader = ZOO["mlp"].loader()
    plain = train(_TwoOptimizersOneBackward(), loader, steps=12)
    growing = MixedPrecision("fp16", initial_scale=1.0, growth_interval=1)  # another scale in each step
    mixed = train(_TwoOptimizersOneBackward(), loader, steps=12, plugins=[growing])
    assert_same_training(plain, mixed, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_gan_with_manual_optimization_trains(dtype):
    entry = ZOO["gan"]
    plain = train(entry.build(), entry.loader(), steps=8)
    mixed = train(entry.build(), entry.loader(), steps=8, plugins=[MixedPrecision(dtype)])
    assert_same_training(plain, mixed, rtol=0.05, atol=0.01)


def test_the_scale_and_the_count_are_resumed_from_a_checkpoint(tmp_path):
    plugin = MixedPrecision("fp16", initial_scale=1024.0)
    run = train(_overflowing(0, 1), ZOO["mlp"].loader(), steps=3, plugins=[plugin])
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")

    resumed = MixedPrecision("fp16")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=4,
        enable_model_summary=False, plugins=[resumed],
    )  # fmt: skip
    trainer.fit(_overflowing(), ZOO["mlp"].loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.state_dict()["scale"] == 256.0
    assert resumed.state_dict()["skipped_steps"] == 2


def test_a_checkpoint_of_lightnings_own_mixed_precision_loads():
    scale = LossScale("cpu")
    scale.load_state_dict(torch.amp.GradScaler("cpu", init_scale=64.0).state_dict())
    assert (scale.value, scale.skipped_steps) == (64.0, 0)


def test_a_step_that_returns_none_neither_steps_nor_fails():
    class ReturnsNone(type(ZOO["mlp"].build())):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    run = train(ReturnsNone(0.0), ZOO["mlp"].loader(), steps=4, plugins=[MixedPrecision("fp16")])
    assert run.trainer.global_step == 4


def test_a_window_whose_last_step_returns_none_steps_with_what_the_others_left():
    class ReturnsNone(type(ZOO["mlp"].build())):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    module = ReturnsNone(0.0)
    ends_with_none, without_it = (
        train(
            copy.deepcopy(module),
            ZOO["mlp"].loader(),
            steps=1,
            callbacks=[GradientAccumulation(batches)],
            plugins=[MixedPrecision("fp16", initial_scale=1024.0)],
        )
        for batches in (3, 2)
    )
    torch.testing.assert_close(ends_with_none.weights, without_it.weights, rtol=1e-3, atol=1e-3)  # of fp16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, "dtype='fp8'.*'bf16', 'fp16'"),
        ({"dtype": "fp16", "initial_scale": 0.0}, "initial_scale=0.0"),
        ({"dtype": "fp16", "growth_interval": 0}, "growth_interval=0"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_possible(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        MixedPrecision(**arguments)


def test_lbfgs_is_refused_with_fp16():
    class Lbfgs(type(ZOO["mlp"].build())):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="LBFGS"):
        train(Lbfgs(0.0), ZOO["mlp"].loader(), plugins=[MixedPrecision("fp16")])


def test_another_precision_given_to_the_trainer_is_refused():
    with pytest.raises(ValueError, match="Received both `precision=32-true`"):
        pl.Trainer(precision="32-true", plugins=[MixedPrecision("bf16")], accelerator="cpu")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_trained_weights_in_float16_are_refused_by_name_and_frozen_ones_are_not(dtype):
    module = ZOO["mlp"].build()
    module.net[0].half()
    with pytest.raises(
        MisconfigurationException, match=r"`net\.0\.weight` and 1 more is stored in float16.*float\(\)"
    ):
        train(module, ZOO["mlp"].loader(), steps=2, plugins=[MixedPrecision(dtype)])
    module.net[0].requires_grad_(False)
    run = train(module, ZOO["mlp"].loader(), steps=2, plugins=[MixedPrecision(dtype, initial_scale=256.0)])
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())
