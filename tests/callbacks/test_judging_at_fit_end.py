"""What judges and calibrates when a fit ends is tried when it begins, on the right data, and steps nothing."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_memopt import (
    ClusterWeights,
    ConstantSparsity,
    GradualPruning,
    PruneOnFitEnd,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
)
from tests.callbacks.classifier import Classifier, fit_signs, signs_loader, trainer_with


class LogsAfterwards(pl.Callback):
    def on_validation_epoch_end(self, trainer, module):
        module.log("of_a_callback", 1.0)


def test_a_metric_that_only_a_callback_logs_is_refused_before_the_first_step():
    callback, module = QuantizeOnFitEnd("int8", max_metric_drop=0.1, monitor="of_a_callback"), Classifier()
    with pytest.raises(MisconfigurationException, match=r"of_a_callback.*logs \['val_accuracy', 'val_loss'\]"):
        fit_signs(callback, module, LogsAfterwards())
    assert module.trainer.global_step == 0


class TakesDicts(Classifier):
    """Whose training batches are of another form than those that it validates on."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_training_batches_that_validation_cannot_take_are_refused_before_the_first_step():
    module, trainer = TakesDicts(), trainer_with(QuantizeOnFitEnd("int8_static"))
    pairs = signs_loader()
    batches = [{"x": x, "y": y} for x, y in pairs]
    with pytest.raises(MisconfigurationException, match=r"calibrated with training batches.*validation_step"):
        trainer.fit(module, batches, signs_loader(1))
    assert trainer.global_step == 0


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_judging_on_one_batch_at_the_start_changes_no_training(workers):
    shuffled = DataLoader(signs_loader().dataset, batch_size=32, shuffle=True, **workers)
    weights = []
    for callbacks in ([], [QuantizeOnFitEnd("int8_static", max_metric_drop=0.5, monitor="val_accuracy")]):
        torch.manual_seed(0)
        module = Classifier()
        trainer_with(*callbacks).fit(module, shuffled, signs_loader(1))
        weights.append(module.state_dict())
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


class StepsItsScheduler(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def lr_scheduler_step(self, scheduler, metric):
        """By hand."""

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.lr_schedulers().step()


def test_validating_at_the_end_steps_no_scheduler_of_the_users():
    trainer, _ = fit_signs(QuantizeOnFitEnd("int8"), StepsItsScheduler())
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2 / 2**3


def test_validation_that_never_ran_is_run_when_training_is_over():
    callback = QuantizeOnFitEnd("int8", max_metric_drop=1.0, monitor="val_accuracy")
    fit_signs(callback, max_epochs=1, check_val_every_n_epoch=5, num_sanity_val_steps=0)
    assert callback.report.metrics_before.keys() == {"val_accuracy", "val_loss"} and callback.quantized is not None


def test_validation_that_never_ran_is_not_that_of_other_data_that_was_validated_before_training():
    callback = QuantizeOnFitEnd("int8")
    trainer, module = (
        trainer_with(callback, max_epochs=1, check_val_every_n_epoch=2, num_sanity_val_steps=0),
        Classifier(),
    )
    other, wanted = signs_loader(2), signs_loader(1)
    wanted.dataset.tensors[1].zero_()
    trainer.validate(module, other, verbose=False)
    trainer.fit(module, signs_loader(), wanted)
    accuracy = float((module.eval()(wanted.dataset.tensors[0]).argmax(1) == 0).float().mean())
    assert callback.report.metrics_before["val_accuracy"] == pytest.approx(accuracy)


class _TakesPairs(Classifier):
    """Trains and validates on batches of two loaders at once."""

    def training_step(self, batch, batch_idx):
        return sum(super(_TakesPairs, self).training_step(part, batch_idx) for part in batch.values())

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["first"], batch_idx)


@pytest.mark.parametrize("has_validation", [True, False])
def test_batches_of_several_loaders_are_joined_in_calibration_and_validation_as_in_training(has_validation):
    callback = QuantizeOnFitEnd("int8_static")
    validated = (
        CombinedLoader({"first": signs_loader(1), "second": signs_loader(2)}, "max_size") if has_validation else None
    )
    trainer_with(callback, max_epochs=1).fit(
        _TakesPairs(), {"first": signs_loader(), "second": signs_loader(1)}, validated
    )
    assert not callback.report.fallbacks and bool(callback.report.metrics_after) == has_validation


class _Once(IterableDataset):
    """A stream that ends once it was read."""

    def __init__(self):
        self.batches = iter(signs_loader())

    def __iter__(self):
        return self.batches


def test_a_stream_of_which_nothing_is_left_to_calibrate_with_is_said():
    callback = QuantizeOnFitEnd("int8_static")
    with pytest.warns(UserWarning, match="no layer saw a batch in calibration"):
        trainer_with(callback, max_epochs=1).fit(Classifier(), DataLoader(_Once(), batch_size=None))
    assert "net.0.weight" in callback.report.fallbacks


@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantizeOnFitEnd("int8"),
        lambda: QuantizationAwareTraining("int8"),
        lambda: PruneOnFitEnd(0.5),
        lambda: ClusterWeights(16),
        lambda: GradualPruning(ConstantSparsity(0.5)),
    ],
)
def test_strategies_that_never_make_the_module_whole_are_refused_in_setup(make):
    for strategy in (ModelParallelStrategy(), FSDPStrategy()):  # of which the latter trains on GPUs alone
        callback = make()
        trainer = SimpleNamespace(strategy=strategy, callbacks=[callback])
        with pytest.raises(MisconfigurationException, match=f"under {type(strategy).__name__} each rank holds parts"):
            callback.setup(trainer, Classifier(), "fit")
