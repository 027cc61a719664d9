"""Gradient accumulation: how many batches make a target, and how many steps the optimizer takes."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_memopt import GradientAccumulation
from tests.callbacks.test_accumulation import TokenModel, loader, token_batches
from tests.parity import assert_same_training, quiet_trainer, train
from tests.resuming import SavesAt
from tests.zoo import ZOO


def test_a_target_batch_size_sets_the_factor():
    entry = ZOO["mlp"]
    one = train(entry.build(), entry.loader(4, batch_size=32), steps=4)
    callback = GradientAccumulation(target_batch_size=32)
    four = train(entry.build(), entry.loader(16), steps=4, callbacks=[callback])
    assert_same_training(one, four, compare_losses=False)


def test_a_target_that_the_loader_cannot_make_is_refused_with_those_that_it_can():
    entry = ZOO["mlp"]
    with pytest.raises(
        MisconfigurationException, match=r"no multiple of 8 \(8 samples a batch x 1 device\); 16 or 24"
    ):
        train(entry.build(), entry.loader(), steps=1, callbacks=[GradientAccumulation(target_batch_size=20)])


def test_a_loader_without_a_batch_size_has_no_target():
    with pytest.raises(MisconfigurationException, match="DataLoader does not tell it"):
        train(TokenModel(), loader(token_batches()), steps=1, callbacks=[GradientAccumulation(target_batch_size=20)])


class AsksForItsSteps(TokenModel):
    def configure_optimizers(self):
        self.estimated = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.parametrize(
    ("accumulation", "options", "steps"),
    [
        (GradientAccumulation(4), {}, 4 + 4 + 4),
        (GradientAccumulation({0: 4, 1: 2}), {}, 4 + 7 + 7),
        (GradientAccumulation(lambda epoch: 1 + epoch), {}, 13 + 7 + 5),
        (GradientAccumulation({0: 5, 4: 2}, by="step"), {}, 3 + (1 + 4) + 7),
        (GradientAccumulation(lambda step: 1 if step < 10 else 8, by="step"), {}, (10 + 1) + 2 + 2),
        (GradientAccumulation({0: 4, 1: 2}), {"steps": 9}, 9),
        (GradientAccumulation({0: 4, 1: 2}), {"limit_train_batches": 5}, 2 + 3 + 3),
    ],
    ids=["constant", "by epoch", "function of the epoch", "by step", "function of the step", "max_steps", "limited"],
)
def test_estimated_stepping_batches_is_how_often_the_optimizer_steps(accumulation, options, steps):
    module = AsksForItsSteps()
    run = train(
        module, loader(token_batches()), callbacks=[accumulation], **({"steps": -1, "max_epochs": 3} | options)
    )
    assert module.estimated == run.trainer.global_step == steps
    assert type(run.trainer) is pl.Trainer


def test_a_one_cycle_schedule_ends_with_training_under_a_target_batch_size():
    class OneCycle(TokenModel):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = self.trainer.estimated_stepping_batches
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    batches = token_batches([10] * 10)
    samples = [{key: tensor[row] for key, tensor in batch.items()} for batch in batches for row in range(2)]
    module = OneCycle()
    accumulation = GradientAccumulation(target_batch_size=8)
    run = train(module, DataLoader(samples, batch_size=2), steps=-1, max_epochs=2, callbacks=[accumulation])
    assert run.trainer.global_step == module.schedule.total_steps == 6
    assert module.schedule.last_epoch == module.schedule.total_steps


def test_a_target_batch_size_is_kept_when_a_reloaded_loader_has_larger_batches():
    class Reloads(TokenModel):
        def train_dataloader(self):
            size = 2 if self.trainer.current_epoch == 0 else 4
            samples = [{key: tensor[0] for key, tensor in batch.items()} for batch in token_batches([5] * 8)]
            return DataLoader(samples, batch_size=size)

    module = Reloads()
    trainer = quiet_trainer(
        -1, GradientAccumulation(target_batch_size=4), max_epochs=2, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(module)
    assert trainer.global_step == 2 + 2


def test_a_target_batch_size_is_kept_by_a_fit_that_goes_on_in_the_middle_of_an_epoch(tmp_path):
    entry, path = ZOO["mlp"], tmp_path / "first.ckpt"

    def fit(*callbacks, ckpt_path=None):
        trainer = quiet_trainer(-1, GradientAccumulation(target_batch_size=16), *callbacks, max_epochs=1)
        trainer.fit(entry.build(), entry.loader(8), ckpt_path=ckpt_path)
        return trainer.global_step

    assert fit(SavesAt(path, step=1)) == fit(ckpt_path=path) == 4


class _SharpnessAware(torch.optim.SGD):
    """Steps with the gradient at the weights that the first one leads to."""

    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        moves = [0.05 * parameter.grad for parameter in parameters]
        torch._foreach_add_([parameter.data for parameter in parameters], moves)
        torch.enable_grad()(closure)()
        torch._foreach_sub_([parameter.data for parameter in parameters], moves)
        super().step()
        return loss


class _Sharp(TokenModel):
    def configure_optimizers(self):
        return _SharpnessAware(self.parameters(), lr=0.1)


class _RunsTwice(TokenModel):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("module", [_Sharp, _RunsTwice])
def test_a_closure_that_runs_twice_is_refused_where_gradients_of_other_batches_wait(module):
    with pytest.raises(MisconfigurationException, match="closure of a window's last batch runs a second time"):
        train(module(), loader(token_batches()), steps=2, callbacks=[GradientAccumulation(2)])
    one = train(module(), loader(token_batches()), steps=4, callbacks=[GradientAccumulation(1)])
    assert_same_training(train(module(), loader(token_batches()), steps=4), one)
