"""What users write in hooks, callbacks and steps works under every strategy as on one device, or is refused."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, Sampler

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.strategies.parity import can_split_backward
from tests.zoo import ZOO


class Net(pl.LightningModule):
    """Blocks, a loss and an optimizer; tests add what is theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [layer for _ in range(2) for layer in (nn.Linear(32, 32), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), *hidden, nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _loader(batches: int = 4) -> DataLoader:
    return ZOO["mlp"].loader(batches, batch_size=8)


def _trainer(strategy: Any, **options: Any) -> pl.Trainer:
    usual: dict[str, Any] = {
        "accelerator": "cpu", "devices": 2, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
    }  # fmt: skip
    return pl.Trainer(strategy=strategy, **(usual | options))


MAKE: dict[str, Callable[[], Any]] = {
    "ddp": lambda: memopt.DataParallelStrategy(),
    "zero1": lambda: memopt.DataParallelStrategy("optimizer"),
    "zero2": lambda: memopt.DataParallelStrategy("gradients"),
    "zero3": lambda: memopt.DataParallelStrategy("parameters"),
    "tp": lambda: memopt.TensorParallelStrategy(),
    "pp": lambda: memopt.PipelineParallelStrategy(microbatches=2),
}


class DropsFromCheckpoints(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state.pop("net.4.bias")
        checkpoint["state_dict"] = {f"old.{name}": value.half() for name, value in state.items()}


@pytest.mark.parametrize("strategy", ["zero3", "tp", "pp"])
def test_a_hook_edits_the_state_dict_of_a_checkpoint_on_every_rank(strategy: str, tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    def fit_and_save() -> None:
        trainer = _trainer(MAKE[strategy](), callbacks=[Saves()])
        trainer.fit(DropsFromCheckpoints(), _loader())
        trainer.save_checkpoint(tmp_path / "after.ckpt")

    run_on_ranks(fit_and_save, 2)
    names = [f"old.{name}" for name in Net().state_dict() if name != "net.4.bias"]
    for file in ("during.ckpt", "after.ckpt"):
        state = torch.load(tmp_path / file, weights_only=True)["state_dict"]
        assert list(state) == names
        assert all(value.device.type == "cpu" and value.dtype == torch.half for value in state.values())


class StopsInStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            self.trainer.should_stop = True
        return loss


class StopsInValidation(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.trainer.should_stop = not self.trainer.sanity_checking


@pytest.mark.parametrize("module", [StopsInStep, StopsInValidation])
def test_a_step_that_stops_the_trainer_stops_every_stage_after_the_batch(module: type[Net]) -> None:
    def fit() -> tuple[int, int]:
        trainer = _trainer(MAKE["pp"](), max_epochs=5)
        trainer.fit(module(), _loader(), _loader(1) if module is StopsInValidation else None)
        return trainer.global_step, trainer.current_epoch

    steps = 2 if module is StopsInStep else 4
    assert run_on_ranks(fit, 2, deadline_seconds=30) == [(steps, 1)] * 2


class Checkpoints(pl.LightningModule):
    """Recomputes its blocks with torch's own function, called in the step."""

    def __init__(self, use_reentrant: bool = False, together: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True) for _ in range(4)
        )
        self.outlet = nn.Linear(32, 4)
        self.use_reentrant = use_reentrant
        self.together = together

    def run_blocks(self, first: int, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[first : first + self.together]:
            hidden = torch.tanh(block(hidden.sin()))
        return hidden

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.inlet(batch[0])[:, None]
        for first in range(0, len(self.blocks), self.together):
            hidden = checkpoint(self.run_blocks, first, hidden, use_reentrant=self.use_reentrant)
        return F.cross_entropy(self.outlet(hidden[:, 0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _losses(module: pl.LightningModule, ranks: int = 1, strategy: Any = "auto", **options: Any) -> list[float]:
    return train(
        module, _loader(), steps=6, devices=ranks, strategy=strategy, use_distributed_sampler=False, **options
    ).losses


@pytest.mark.parametrize(
    ("schedule", "together"),
    [("1f1b", 1), ("interleaved_1f1b", 3), pytest.param("zbv", 2, marks=can_split_backward)],
)
def test_blocks_that_the_step_recomputes_by_itself_train_as_on_one_device(schedule: Any, together: int) -> None:
    def fit() -> list[float]:
        strategy = memopt.PipelineParallelStrategy(schedule, microbatches=4)
        return _losses(Checkpoints(together=together), 2, strategy)

    plain = run_on_ranks(lambda: _losses(Checkpoints(together=together)), 1)[0]
    for losses in run_on_ranks(fit, 2, deadline_seconds=30):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_blocks_recomputed_in_the_reentrant_way_are_refused_by_name() -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match=r"`blocks.0` is called by .*use_reentrant=False"):
            _losses(Checkpoints(use_reentrant=True), 2, MAKE["pp"]())

    run_on_ranks(fit, 2, deadline_seconds=30)


AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9),
}


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "tp", "pp"])
def test_averages_of_whole_weights_are_refused_by_name_where_ranks_hold_parts(strategy: str) -> None:
    def fit() -> None:
        for name, make in AVERAGING.items():
            trainer = _trainer(MAKE[strategy](), callbacks=[make()])
            with pytest.raises(MisconfigurationException, match=rf"Strategy: {name} cannot work here.*memopt_ddp"):
                trainer.fit(Net(), _loader())

    run_on_ranks(fit, 2)


@pytest.mark.parametrize("name", AVERAGING)
def test_replicas_average_their_weights_as_one_device_does(name: str) -> None:
    def fit(ranks: int, strategy: Any) -> np.ndarray:
        trainer = _trainer(strategy, devices=ranks, max_epochs=3, callbacks=[AVERAGING[name]()])
        trainer.fit(module := Net(), _loader())
        return module.net[0].weight.detach().numpy()

    plain = run_on_ranks(lambda: fit(1, "auto"), 1)[0]
    for weights in run_on_ranks(lambda: fit(2, MAKE["ddp"]()), 2):
        np.testing.assert_allclose(weights, plain, rtol=1e-5, atol=1e-7)


class LogsGradientNorms(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms = grad_norm(self, 2)
        self.log_dict(self.norms)


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "tp"])
def test_the_norms_of_gradients_that_a_hook_logs_are_those_of_one_device(strategy: str) -> None:
    def fit(ranks: int, make: Callable[[], Any]) -> dict[str, float]:
        trainer = _trainer(make(), devices=ranks)
        trainer.fit(module := LogsGradientNorms(), _loader())
        assert module.norms.keys() <= trainer.callback_metrics.keys()
        return {name: float(norm) for name, norm in module.norms.items()}

    plain = run_on_ranks(lambda: fit(1, lambda: "auto"), 1)[0]
    for norms in run_on_ranks(lambda: fit(2, MAKE[strategy]), 2):
        assert norms == pytest.approx(plain, rel=1e-5)


class JoinsParameters(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize("strategy", ["zero3", "tp", "pp"])
def test_an_optimizer_that_joins_parameters_is_refused_by_name_where_ranks_hold_parts(strategy: str) -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match=r"Strategy: LBFGS .*AdamW"):
            _trainer(MAKE[strategy]()).fit(JoinsParameters(), _loader())

    run_on_ranks(fit, 2)


class RaisesInValidation(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("no such label")


class RaisesBetweenLayers(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError(f"width is {self.net[0](batch[0]).shape[1]}")


def test_an_error_of_the_users_own_comes_out_of_a_pipeline_as_it_was() -> None:
    def fit() -> None:
        with pytest.raises(ValueError, match=r"^no such label$"):
            _trainer(MAKE["pp"](), num_sanity_val_steps=0).fit(RaisesInValidation(), _loader(), _loader(1))
        with pytest.raises(ValueError, match=r"^width is 32$"):
            _trainer(MAKE["pp"]()).fit(RaisesBetweenLayers(), _loader())

    run_on_ranks(fit, 2)


class ReadsPairs(Net):
    """Has batches of which not all tensors have one row a sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:2], batch_idx) * batch[2].mean()


def _pairs(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]), torch.ones(3)


def test_batches_that_cannot_be_cut_are_refused_with_what_to_do_and_are_left_whole_as_one_micro_batch() -> None:
    loader = DataLoader(_loader().dataset, batch_size=8, collate_fn=_pairs)

    def fit() -> list[float]:
        with pytest.raises(MisconfigurationException, match=r"disagree on .*collate_fn.*microbatches=1") as refused:
            _trainer("memopt_pp").fit(ReadsPairs(), loader)
        assert "split=" not in str(refused.value)
        options = {"strategy": memopt.PipelineParallelStrategy(microbatches=1), "use_distributed_sampler": False}
        return train(ReadsPairs(), loader, steps=4, devices=2, **options).losses

    plain = run_on_ranks(lambda: train(ReadsPairs(), loader, steps=4).losses, 1)[0]
    for losses in run_on_ranks(fit, 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self, samples: int, has_length: bool) -> None:
        dataset = _loader(samples // 8).dataset
        self.rows = iter([dataset[index] for index in range(samples)])
        if has_length:
            self.__class__ = type("SizedOnce", (Once,), {"__len__": lambda _: samples})

    def __iter__(self) -> Any:
        return self.rows


class SeesSums(Net):
    """Takes its batches apart, as steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.sums.append(float(batch["x"].sum()))

    on_test_batch_start = on_train_batch_start

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["x"], batch.pop("y")), batch_idx)

    test_step = training_step


def _as_dict(samples: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}


@pytest.mark.parametrize(("schedule", "has_length"), [("1f1b", False), ("interleaved_1f1b", True)])
def test_a_pipeline_loses_nothing_of_a_stream_that_can_be_read_once(schedule: Any, has_length: bool) -> None:
    def stream() -> DataLoader:
        return DataLoader(Once(32, has_length), batch_size=8, collate_fn=_as_dict)

    def run(ranks: int, make: Callable[[], Any]) -> tuple[list[float], list[float]]:
        fitted, tested = SeesSums(), SeesSums()
        _trainer(make(), devices=ranks).fit(fitted, stream())
        _trainer(make(), devices=ranks).test(tested, stream(), verbose=False)
        return fitted.sums, tested.sums

    plain = run_on_ranks(lambda: run(1, lambda: "auto"), 1)[0]
    assert [len(sums) for sums in plain] == [4, 4]
    make = partial(memopt.PipelineParallelStrategy, schedule)
    assert run_on_ranks(lambda: run(2, make), 2, deadline_seconds=30) == [plain, plain]


@pytest.mark.parametrize(
    "make",
    [
        partial(memopt.DataParallelStrategy, "parameters"),
        partial(memopt.PipelineParallelStrategy),
        partial(memopt.PipelineParallelStrategy, save="sharded"),
    ],
    ids=["zero3", "pp", "pp_sharded"],
)
def test_the_process_that_forked_the_ranks_saves_what_they_trained(make: Any, tmp_path: Path) -> None:
    trainer = _trainer(make(start_method="fork"))
    trainer.fit(module := Net(), _loader())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = memopt.full_state_dict(tmp_path / "saved.ckpt")
    assert list(saved) == list(Net().state_dict())
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=0)
    assert not torch.equal(saved["net.0.weight"], Net().net[0].weight)


class Penalizes(Checkpoints):
    """Adds a penalty on all weights to the loss, in the step."""

    makes_whole = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        squares: list[Any] = [parameter.pow(2).sum() for parameter in self.parameters()]
        if self.makes_whole:
            squares = [s.full_tensor() if isinstance(s, DTensor) else s for s in squares]
        return super().training_step(batch, batch_idx) + 0.01 * sum(squares)


class PenalizesWhole(Penalizes):
    makes_whole = True


@pytest.mark.parametrize("strategy", ["zero3", "tp"])
def test_a_penalty_on_weights_is_refused_where_ranks_hold_parts_and_trains_as_on_one_device_when_whole(strategy: str):
    def fit() -> list[float]:
        said = r"Strategy: `training_step` computes with a parameter outside .*full_tensor\(\).*weight_decay"
        with pytest.raises(MisconfigurationException, match=said):
            _losses(Penalizes(), 2, MAKE[strategy]())
        return _losses(PenalizesWhole(), 2, MAKE[strategy]())

    plain = run_on_ranks(lambda: _losses(Penalizes()), 1)[0]
    for losses in run_on_ranks(fit, 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class RaisesInBackward(PenalizesWhole):
    def on_before_backward(self, loss: torch.Tensor) -> None:
        raise KeyError("of the user's")


@pytest.mark.parametrize("strategy", ["zero3", "tp"])
def test_the_error_of_a_step_is_what_comes_out_when_ranks_keep_their_parts(strategy: str) -> None:
    def fit() -> None:
        with pytest.raises(KeyError, match="of the user's"):
            _losses(RaisesInBackward(), 2, MAKE[strategy]())

    run_on_ranks(fit, 2)


class TwoByHand(pl.LightningModule):
    """Two networks in a list, each stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(16, 8 * n), nn.ReLU(), nn.Linear(8 * n, 4)) for n in (1, 2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(net.parameters(), lr=0.01) for net in self.nets]


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_networks_in_a_list_that_are_stepped_by_hand_train_as_on_one_device(strategy: str) -> None:
    def fit(ranks: int, make: Callable[[], Any]) -> list[np.ndarray]:
        _trainer(make(), devices=ranks).fit(module := TwoByHand(), _loader())
        return [weight.detach().numpy() for weight in module.parameters()]

    plain = run_on_ranks(lambda: fit(1, lambda: "auto"), 1)[0]
    for weights in run_on_ranks(lambda: fit(2, MAKE[strategy]), 2):
        for ours, theirs in zip(weights, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class Backwards(Sampler):
    """The user's own order."""

    def __init__(self, dataset: Any) -> None:
        self.length = len(dataset)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return iter(range(self.length - 1, -1, -1))


class SeesBatches(Net):
    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.sums.append(float(batch[0].sum()))


@pytest.mark.parametrize("strategy", ["tp", "pp"])
def test_the_users_sampler_stays_where_all_ranks_have_the_same_batches(strategy: str) -> None:
    dataset = _loader().dataset
    make_loaders: list[Callable[[], DataLoader]] = [
        lambda: DataLoader(dataset, batch_size=8),
        lambda: DataLoader(dataset, batch_size=8, sampler=Backwards(dataset)),
        lambda: DataLoader(dataset, batch_size=8, shuffle=True),
    ]

    def fit(ranks: int, make: Callable[[], Any]) -> list[list[float]]:
        seen = []
        for make_loader in make_loaders:
            trainer = _trainer(make(), devices=ranks, use_distributed_sampler=True)
            trainer.fit(module := SeesBatches(), make_loader())
            seen.append(module.sums)
        return seen

    def seeded_by_rank() -> list[list[float]]:
        torch.manual_seed(int(os.environ["RANK"]))
        return fit(2, MAKE[strategy])

    in_order, backwards, _ = run_on_ranks(lambda: fit(1, lambda: "auto"), 1)[0]
    first, second = run_on_ranks(seeded_by_rank, 2)
    assert first == second
    assert first[:2] == [in_order, backwards]
    assert sorted(first[2]) != sorted(in_order)


class KeepsOutputs(Net):
    """Appends to lists in its steps, and computes from them at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.val_losses: list[torch.Tensor] = []
        self._kept: list[dict[str, torch.Tensor]] = []
        self.counts: list[int] = []
        self.computed: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        losses = torch.stack(self.losses)
        self.computed.append([len(losses), float(losses.mean())])
        self.losses.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counts.append(len(batch[0]))
        logits = self(batch[0])
        self._kept.append({"logits": logits, "labels": batch[1]})
        self.val_losses.append(F.cross_entropy(logits, batch[1]))

    def on_validation_epoch_end(self) -> None:
        logits, labels = (torch.cat([kept[name] for kept in self._kept]) for name in ("logits", "labels"))
        losses = torch.stack(self.val_losses)
        whole = float(F.cross_entropy(logits, labels))
        self.computed.append([len(self._kept), sum(self.counts), len(losses), float(losses.mean()), whole])
        for kept in (self._kept, self.counts, self.val_losses):
            kept.clear()


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_what_steps_append_to_lists_is_on_every_rank_of_a_pipeline_as_on_one_device(schedule: Any) -> None:
    def fit(ranks: int, strategy: Any) -> list[list[float]]:
        trainer = _trainer(strategy, devices=ranks, num_sanity_val_steps=0)
        trainer.fit(module := KeepsOutputs(), _loader(3), DataLoader(_loader(3).dataset, batch_size=9))
        trainer.validate(module, _loader(2), verbose=False)
        return module.computed

    plain = run_on_ranks(lambda: fit(1, "auto"), 1)[0]
    assert len(plain) == 3
    for computed in run_on_ranks(lambda: fit(2, memopt.PipelineParallelStrategy(schedule)), 2, deadline_seconds=30):
        for ours, theirs in zip(computed, plain, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
