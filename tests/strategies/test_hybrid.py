"""Products of parallelism on four ranks: the training of one device, bytes per rank, checkpoints, refusals."""

import os
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DTensor
from torchmetrics import SumMetric

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.strategies.parity import assert_same_outcome, can_split_backward, fit_zoo, on_one_device
from tests.zoo import ZOO

QUICK = [("gpt2", {"shard": 2, "tensor": 2}), ("mlp", {"pipeline": 2, "shard": 2})]
PRODUCTS = (
    {"shard": 2, "tensor": 2},
    {"data": 2, "tensor": 2},
    {"data": 2, "shard": 2},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "shard": 2},
    {"pipeline": 2, "data": 2},
)


NO_PIPELINE = ("gan",)
"""Optimizes by hand."""


def _matrix() -> list[Any]:
    pairs = [
        (name, sizes)
        for name, entry in ZOO.items()
        for sizes in PRODUCTS
        if not entry.has_batch_norm and not ("pipeline" in sizes and name in NO_PIPELINE)
    ]
    return [
        pytest.param(name, sizes, marks=[] if (name, sizes) in QUICK else [pytest.mark.slow]) for name, sizes in pairs
    ]


@pytest.mark.parametrize(("name", "sizes"), _matrix())
def test_four_ranks_train_as_one_device(name, sizes):
    options = {"sizes": MeshSizes(**sizes), "strategy": memopt.HybridStrategy(**sizes)}
    for outcome in run_on_ranks(lambda: fit_zoo(ZOO[name], 4, **options), 4, deadline_seconds=150):
        assert_same_outcome(on_one_device(name), outcome)


class LocalBytes(Callback):
    """Bytes of parameters and optimizer state that this rank holds, after each step."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *arguments: Any) -> None:
        state = [v for s in trainer.optimizers[0].state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in (*module.parameters(), *state)]
        self.seen = sum(t.numel() * t.element_size() for t in local if not t.is_meta)


def test_shards_of_parts_take_their_share_of_what_is_split():
    def fit(strategy: Any) -> int:
        probe = LocalBytes()
        loader = ZOO["llama"].loader(batches=2)
        train(ZOO["llama"].build(), loader, steps=1, devices=4, strategy=strategy, callbacks=[probe])
        return probe.seen

    plain = run_on_ranks(lambda: fit("memopt_ddp"), 4)[0]
    for share in run_on_ranks(lambda: fit(memopt.HybridStrategy(shard=2, tensor=2)), 4):
        # Norms are replicated over the tensor group, and are 1% of this model.
        assert share <= plain * (1 / 4 + 0.05)


@pytest.mark.slow
def test_a_checkpoint_holds_fused_weights_as_one_device_would_and_training_goes_on_from_it(tmp_path):
    sizes = {"shard": 2, "tensor": 2}

    def fit(steps: int, path: Any = None) -> tuple[list[float], dict[str, np.ndarray]]:
        # One batch an epoch: resuming, Lightning starts the data over.
        module = ZOO["gpt2"].build()
        run = train(
            module, ZOO["gpt2"].loader(batches=1, batch_size=4), steps=steps, devices=4, ckpt_path=path,
            strategy=memopt.HybridStrategy(**sizes), use_distributed_sampler=False,
        )  # fmt: skip
        if path is None and steps == 4:
            run.trainer.save_checkpoint(tmp_path / "after.ckpt")
        return run.losses, {name: weight.numpy() for name, weight in run.weights.items()}

    whole, _ = run_on_ranks(lambda: fit(8), 4)[0]
    _, weights = run_on_ranks(lambda: fit(4), 4)[0]
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    for name, weight in weights.items():
        np.testing.assert_array_equal(saved["state_dict"][name].numpy(), weight, err_msg=name)
    resumed, _ = run_on_ranks(lambda: fit(8, tmp_path / "after.ckpt"), 4)[0]
    np.testing.assert_allclose(resumed, whole[4:], rtol=1e-6)
    plain = train(
        ZOO["gpt2"].build(), ZOO["gpt2"].loader(batches=1, batch_size=4), steps=8, ckpt_path=tmp_path / "after.ckpt"
    )
    np.testing.assert_allclose(plain.losses, whole[4:], rtol=1e-5)


class Counting(type(ZOO["mlp"].build())):
    """Counts samples with a metric and by a sum over devices."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.samples = SumMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.samples(len(batch[0]))
        self.log("metric", self.samples)
        self.log("sum", float(len(batch[0])), reduce_fx="sum", sync_dist=True)


def test_metrics_and_sums_over_devices_count_each_batch_once():
    def validate() -> tuple[float, float]:
        trainer = pl.Trainer(
            accelerator="cpu", devices=4, strategy=memopt.HybridStrategy(data=2, tensor=2), logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.validate(Counting(), ZOO["mlp"].loader(batches=4, batch_size=8), verbose=False)
        return float(trainer.callback_metrics["metric"]), float(trainer.callback_metrics["sum"])

    assert run_on_ranks(validate, 4) == [(32.0, 32.0)] * 4


def test_ranks_of_a_tensor_group_get_the_same_batches_and_others_different_ones():
    def first_samples() -> list[float]:
        seen: list[float] = []

        class See(Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                seen.append(float(batch[0].sum()))

        strategy = memopt.HybridStrategy(data=-1, tensor=2)
        train(
            ZOO["mlp"].build(), ZOO["mlp"].loader(batches=4), steps=2, devices=4, strategy=strategy, callbacks=[See()]
        )
        return seen

    first, second, third, fourth = run_on_ranks(first_samples, 4)
    assert first == second
    assert third == fourth
    assert not set(first) & set(third)


def test_sizes_whose_product_is_not_the_world_are_refused_with_those_that_are():
    def fit() -> str:
        with pytest.raises(MisconfigurationException) as error:
            train(
                ZOO["mlp"].build(), ZOO["mlp"].loader(batches=2), devices=2,
                strategy=memopt.HybridStrategy(data=2, tensor=2),
            )  # fmt: skip
        return str(error.value)

    for message in run_on_ranks(fit, 2):
        assert "HybridStrategy" in message and "makes 4, and there are 2 ranks" in message
        assert "pipeline=1, data=2, shard=1, tensor=1" in message
    assert os.environ.get("RANK") is None


@pytest.mark.slow
def test_eight_ranks_train_as_one_device_over_every_dimension_but_one():
    sizes = {"pipeline": 2, "shard": 2, "tensor": 2}
    options = {"sizes": MeshSizes(**sizes), "strategy": memopt.HybridStrategy(**sizes)}
    for outcome in run_on_ranks(lambda: fit_zoo(ZOO["gpt2"], 8, **options), 8, deadline_seconds=250):
        assert_same_outcome(on_one_device("gpt2"), outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("t5", {"pipeline": 2, "shard": 2}, {"schedule": "interleaved_1f1b"}),
        pytest.param("t5", {"pipeline": 2, "tensor": 2}, {"schedule": "zbv"}, marks=can_split_backward),
        ("gpt2", {"pipeline": 2, "shard": 2}, {"save": "sharded"}),
    ],
)
def test_other_schedules_and_saves_train_as_one_device(name, sizes, options):
    strategy = memopt.HybridStrategy(**sizes, **options)
    fit = {"sizes": MeshSizes(**sizes), "strategy": strategy}
    for outcome in run_on_ranks(lambda: fit_zoo(ZOO[name], 4, **fit), 4, deadline_seconds=150):
        assert_same_outcome(on_one_device(name), outcome)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"pipeline": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "shard": 2}, marks=pytest.mark.slow),
        pytest.param({"shard": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_within_each_stage_trains_as_one_device(sizes):
    fit = {"sizes": MeshSizes(**sizes), "strategy": memopt.HybridStrategy(**sizes)}
    extra = [memopt.ActivationCheckpointing("full")]
    for outcome in run_on_ranks(lambda: fit_zoo(ZOO["gpt2"], 4, 8, extra=extra, **fit), 4, deadline_seconds=150):
        plain = on_one_device("gpt2")
        np.testing.assert_allclose(outcome.losses, plain.losses[: len(outcome.losses)], rtol=1e-5)
        np.testing.assert_allclose(outcome.grad_norms, plain.grad_norms[:8], rtol=1e-5)


def test_by_its_name_alone_it_shards_over_all_ranks():
    def fit() -> int:
        run = train(ZOO["mlp"].build(), ZOO["mlp"].loader(2), steps=2, devices=2, strategy="memopt_hybrid")
        return run.trainer.strategy.sizes.shard

    assert run_on_ranks(fit, 2) == [2, 2]


def test_zero_bubbles_are_refused_beside_shards():
    with pytest.raises(MisconfigurationException, match="schedule='zbv', data=1, shard=2"):
        memopt.HybridStrategy(pipeline=2, shard=2, schedule="zbv")


def test_a_loss_over_split_logits_is_refused_beside_a_pipeline():
    with pytest.raises(MisconfigurationException, match="loss_parallel=True, pipeline=2"):
        memopt.HybridStrategy(pipeline=2, tensor=2, loss_parallel=True)
