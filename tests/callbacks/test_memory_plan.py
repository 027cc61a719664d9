"""MemoryPlan switches on what was planned, leaves nothing behind, and plans again where it was wrong."""

import json
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import lightning_memopt as memopt
from lightning_memopt.cli import main
from lightning_memopt.memory.command import PLANNED
from tests.distributed import run_on_ranks
from tests.planning.a_cpu import A_CPU
from tests.planning.test_plan import TIGHT, Deep, _batch


def _loader(samples: int = 512) -> DataLoader:
    return DataLoader(TensorDataset(*_batch(4 * samples)), batch_size=samples)


def _fit(module, *callbacks, tmp_path, steps=4, ckpt_path=None, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, _loader(), ckpt_path=ckpt_path)
    return trainer


def test_a_run_under_a_plan_stays_within_its_budget_trains_the_same_and_can_be_reported(tmp_path, capsys):
    torch.manual_seed(0)
    module, plain = Deep(), Deep()
    plain.load_state_dict(module.state_dict())
    plan = memopt.MemoryPlan(TIGHT, device=A_CPU)
    _fit(module, plan, tmp_path=tmp_path)
    _fit(plain, tmp_path=tmp_path)
    assert plan.measured_bytes <= TIGHT
    assert plan.result.best.peak_bytes == pytest.approx(plan.measured_bytes, rel=0.02)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(module.state_dict()[name], tensor, rtol=1e-5, atol=1e-7), name
    said = json.loads((tmp_path / PLANNED).read_text())
    assert said["measured_bytes"] == plan.measured_bytes and said["chosen"] == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--json"]) == 0
    (reported,) = json.loads(capsys.readouterr().out)
    assert reported["measured"]["peak_bytes"] == plan.measured_bytes
    assert reported["predicted"]["peak_bytes"] == plan.result.best.peak_bytes
    assert reported["error"] == plan.result.best.peak_bytes / plan.measured_bytes - 1
    assert main(["report", str(tmp_path)]) == 0
    assert "auto, " in capsys.readouterr().out


def test_a_plan_draws_no_random_numbers_of_the_training(tmp_path):
    class Noisy(Dataset):
        def __init__(self) -> None:
            self.inputs, self.targets = _batch(8)
            self.own = random.Random(0)

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, index):
            noise = torch.rand(()) + np.random.rand() + random.random() + self.own.random()
            return self.inputs[index] + noise.float(), self.targets[index]

    def losses(batched: bool, *callbacks: Callback) -> list[float]:
        pl.seed_everything(0)
        record = Recorder()
        trainer = pl.Trainer(
            max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[*callbacks, record], default_root_dir=tmp_path,
        )  # fmt: skip
        order = {"batch_size": 4, "shuffle": True, "generator": torch.Generator()}
        sampler = BatchSampler(RandomSampler(range(8), generator=torch.Generator()), 4, drop_last=False)
        loader = DataLoader(Noisy(), **(order if batched else {"batch_sampler": sampler}))
        trainer.fit(Deep(), loader)
        return record.losses

    for batched in (True, False):
        assert losses(batched, memopt.MemoryPlan("1GiB", device=A_CPU)) == losses(batched)


def test_a_plan_that_cannot_be_written_ends_no_training_and_a_trial_run_writes_none(tmp_path):
    in_the_way = tmp_path / "a file"
    in_the_way.touch()
    plan = memopt.MemoryPlan("1GiB", device=A_CPU)
    with pytest.warns(UserWarning, match="MemoryPlan could not write what it planned: .*a file"):
        trainer = _fit(Deep(), plan, tmp_path=in_the_way / "runs")
    assert trainer.global_step == 4 and plan.measured_bytes is not None
    _fit(Deep(), memopt.MemoryPlan("1GiB", device=A_CPU), tmp_path=tmp_path, fast_dev_run=3)
    assert not (tmp_path / PLANNED).exists()


@pytest.mark.parametrize("budget", [TIGHT, "1GiB"])  # with techniques, and as it is
def test_a_run_that_is_resumed_is_planned_and_measured_as_before_and_trains_as_without_the_plan(budget, tmp_path):
    first, second = (memopt.MemoryPlan(budget, device=A_CPU) for _ in range(2))
    checkpoint, weights = tmp_path / "four.ckpt", []
    _fit(Deep(), first, tmp_path=tmp_path).save_checkpoint(checkpoint)
    for callbacks in ([second], []):
        module = Deep()
        _fit(module, *callbacks, tmp_path=tmp_path, steps=8, ckpt_path=checkpoint)
        weights.append(module.state_dict())
    assert second.result.best.choice == first.result.best.choice
    assert second.measured_bytes == first.measured_bytes
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


class Recorder(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.rows = iter([dataset[index] for index in range(len(dataset))])

    def __iter__(self):
        return self.rows


class SeesSums(Deep):
    sums: list[float]

    def on_train_batch_start(self, batch, batch_idx):
        self.sums.append(float(batch[0].sum()))


@pytest.mark.parametrize("plans", ["callback", pytest.param("strategy", marks=pytest.mark.distributed)])
def test_a_stream_that_can_be_read_once_loses_no_batch_to_the_plan(plans, tmp_path):
    dataset = TensorDataset(*_batch(32, 64))
    options = {
        "callback": lambda: {"callbacks": [memopt.MemoryPlan("1GiB", device=A_CPU)]},
        "strategy": lambda: {"strategy": memopt.AutoStrategy("1GiB", device=A_CPU)},
    }[plans]

    def fit() -> tuple[list[float], bool]:
        module, loader = SeesSums(2, 64), DataLoader(Once(dataset), batch_size=8)
        module.sums = []
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **options(),
        )  # fmt: skip
        trainer.fit(module, loader)
        return module.sums, type(loader) is DataLoader

    sums, is_loader = run_on_ranks(fit, 1)[0] if plans == "strategy" else fit()
    assert sums == [float(x.sum()) for x, _ in DataLoader(dataset, batch_size=8)]
    assert is_loader


@pytest.mark.slow
def test_each_fit_of_another_trainer_is_planned_and_the_next_one_of_the_same_keeps_the_plan(tmp_path, monkeypatch):
    plan, module, planned = memopt.MemoryPlan(TIGHT, device=A_CPU), Deep(), []
    make = plan.make_plan

    def counted(*args, **options):
        planned.append(planned[0] if planned else make(*args, **options))  # which takes a while
        return planned[-1]

    monkeypatch.setattr(plan, "make_plan", counted)
    first = _fit(module, plan, tmp_path=tmp_path)
    first.fit_loop.epoch_loop.max_steps = 6
    first.fit(module, _loader())
    assert len(planned) == 1
    second = _fit(module, plan, tmp_path=tmp_path)
    kinds = [[type(callback) for callback in trainer.callbacks] for trainer in (first, second)]
    assert len(planned) == 2 and kinds[0] == kinds[1] and plan.result.best.callbacks()


@pytest.mark.slow
def test_a_plan_that_was_wrong_is_made_again_once(tmp_path, monkeypatch):
    from dataclasses import replace

    plan, calls = memopt.MemoryPlan(TIGHT, device=A_CPU), []
    make = plan.make_plan

    def optimistic(trainer, module, batch, budget, **options):
        calls.append(budget)
        if len(calls) > 1:
            return make(trainer, module, batch, budget, **options)
        plain = make(trainer, module, batch, "1GiB", **options)  # takes more than the budget and does not say so
        too_small = replace(plain.plans[0], peak_bytes=plain.plans[0].peak_bytes * 4 // 5)
        return replace(plain, plans=(too_small,), budget_bytes=TIGHT)

    monkeypatch.setattr(plan, "make_plan", optimistic)
    with pytest.warns(UserWarning, match="predicted .* and a step takes .*planned again"):
        _fit(Deep(), plan, tmp_path=tmp_path, steps=6)
    assert len(calls) == 2 and calls[1] < TIGHT
    assert plan.result.best.callbacks() != []


@pytest.mark.slow
def test_a_budget_that_nothing_fits_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(MisconfigurationException, match="the smallest budget that would do"):
        _fit(Deep(), memopt.MemoryPlan("40KiB", device=A_CPU), tmp_path=tmp_path)


def test_a_technique_that_the_trainer_has_already_is_refused_by_name(tmp_path):
    theirs = [memopt.MicroBatching(256), memopt.ActivationCheckpointing("full"), memopt.OptimizerInBackward()]
    for callback in theirs[:2]:
        plan = memopt.MemoryPlan(TIGHT, device=A_CPU)
        try:
            _fit(Deep(), callback, plan, tmp_path=tmp_path)
        except MisconfigurationException as error:
            assert "has already" in str(error)
            return
    pytest.fail("neither of two techniques was planned")


def test_a_strategy_that_splits_the_module_is_refused_with_what_to_use():
    plan, trainer = memopt.MemoryPlan("1GiB", device=A_CPU), pl.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.__class__ = type("Split", (DDPStrategy,), {"splits_module": True})
    with pytest.raises(MisconfigurationException, match="memopt_auto"):
        plan.setup(trainer, Deep(), "fit")


def test_beside_a_profiler_of_pytorchs_it_trains_and_says_that_it_does_not_measure(tmp_path):
    plan = memopt.MemoryPlan(TIGHT, device=A_CPU)
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="profile")
    with pytest.warns(UserWarning, match="MemoryPlan does not measure what a step takes: .* PyTorchProfiler"):
        trainer = _fit(Deep(), plan, tmp_path=tmp_path, profiler=profiler)
    assert trainer.global_step == 4
    assert plan.result.best is not None and plan.measured_bytes is None
