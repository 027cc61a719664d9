"""memopt_auto is, once it has planned, the strategy that it chose."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.planning.a_cpu import A_CPU
from tests.planning.test_plan import Deep, _batch


def _train(budget: str, devices: int):
    torch.manual_seed(0)
    module = Deep(2, 64)
    strategy = memopt.AutoStrategy(budget, device=A_CPU)
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", devices=devices, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*_batch(64, 64)), batch_size=4))
    plan = strategy.memory_plan
    assert plan.result is not None and plan.result.best is not None
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    return type(trainer.strategy).__name__, plan.result.best.strategy, plan.measured_bytes, weights


@pytest.mark.slow
def test_with_room_for_replicas_the_weights_are_those_of_plain_replicas():
    name, planned, measured, weights = run_on_ranks(_train, 2, "1GiB", 2)[0]
    assert planned.startswith("memopt_") and measured > 0
    assert name == "DataParallelStrategy"
    assert set(weights) == set(Deep(2, 64).state_dict())


@pytest.mark.slow
def test_a_budget_too_small_for_replicas_shards_and_keeps_within_it():
    whole = memopt.predict_memory(Deep(2, 64), _batch(4, 64)).peak_bytes
    budget = int(whole * 0.8)
    ranks = run_on_ranks(_train, 2, budget, 2)
    assert {planned for _, planned, _, _ in ranks} != {"memopt_ddp"}
    # What collectives hold for a moment in threads of gloo's is kilobytes, and not always there.
    assert all(measured <= budget + 33 * 2**10 < whole for _, _, measured, _ in ranks), ranks


@pytest.mark.slow
def test_a_budget_that_nothing_fits_is_refused_on_every_rank():
    def refused() -> bool:
        try:
            _train("20KiB", 2)
        except MisconfigurationException as error:
            return "the smallest budget" in str(error)
        return False

    assert run_on_ranks(refused, 2, deadline_seconds=200) == [True, True]


@pytest.mark.slow
def test_the_name_alone_plans_for_this_machine():
    def run() -> str:
        trainer = pl.Trainer(max_steps=2, accelerator="cpu", devices=2, strategy="memopt_auto", logger=False)
        trainer.fit(Deep(), DataLoader(TensorDataset(*_batch(64)), batch_size=4))
        return type(trainer.strategy).__name__

    assert run_on_ranks(run, 2, deadline_seconds=200)[0] == "DataParallelStrategy"


def _train_in_a_pipeline(devices: int):
    from lightning_memopt.demo.model import GPT
    from lightning_memopt.parallel.mesh import MeshSizes
    from lightning_memopt.planning import plan as planning
    from lightning_memopt.planning.space import Layout

    planning.find_layouts = lambda *_, **__: [Layout("memopt_pp", MeshSizes(pipeline=devices))]
    torch.manual_seed(0)
    module = GPT(layers=4, width=32, heads=2, context=16)
    strategy = memopt.AutoStrategy("1GiB", device=A_CPU)
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", devices=devices, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randint(0, 60, (32, 17)), batch_size=8))
    plan = strategy.memory_plan
    assert plan.result is not None and plan.result.best is not None
    return type(trainer.strategy).__name__, plan.result.best.peak_bytes, plan.measured_bytes


@pytest.mark.slow
def test_a_pipeline_that_is_chosen_trains_and_holds_what_was_planned():
    for name, predicted, measured in run_on_ranks(_train_in_a_pipeline, 2, 2, deadline_seconds=240):
        assert name == "PipelineParallelStrategy"
        assert predicted == pytest.approx(measured, rel=0.05)
