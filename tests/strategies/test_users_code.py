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
from torch.utils.data import DataLoader, Sampler

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.strategies.users import MAKE, Checkpoints, Net, losses_of, small_loader, trainer_with


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
        trainer = trainer_with(MAKE[strategy](), callbacks=[Saves()])
        trainer.fit(DropsFromCheckpoints(), small_loader())
        trainer.save_checkpoint(tmp_path / "after.ckpt")

    run_on_ranks(fit_and_save, 2)
    names = [f"old.{name}" for name in Net().state_dict() if name != "net.4.bias"]
    for file in ("during.ckpt", "after.ckpt"):
        state = torch.load(tmp_path / file, weights_only=True)["state_dict"]
        assert list(state) == names
        assert all(value.device.type == "cpu" and value.dtype == torch.half for value in state.values())


class ReadsWeights(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["norms"] = {name: float(value.norm()) for name, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("strategy", ["zero3", "tp", "pp"])
def test_a_hook_reads_the_weights_that_are_saved_after_training_on_every_rank(strategy: str, tmp_path: Path) -> None:
    def fit_and_save() -> None:
        trainer = trainer_with(MAKE[strategy]())
        trainer.fit(ReadsWeights(), small_loader())
        trainer.save_checkpoint(tmp_path / "after.ckpt")

    run_on_ranks(fit_and_save, 2, deadline_seconds=40)
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["norms"] == {name: float(value.norm()) for name, value in saved["state_dict"].items()}


AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9),
}


@pytest.mark.parametrize("name", AVERAGING)
def test_replicas_average_their_weights_as_one_device_does(name: str) -> None:
    def fit(ranks: int, strategy: Any) -> np.ndarray:
        trainer = trainer_with(strategy, devices=ranks, max_epochs=3, callbacks=[AVERAGING[name]()])
        trainer.fit(module := Net(), small_loader())
        return module.net[0].weight.detach().numpy()

    plain = run_on_ranks(lambda: fit(1, "auto"), 1)[0]
    for weights in run_on_ranks(lambda: fit(2, MAKE["ddp"]()), 2):
        np.testing.assert_allclose(weights, plain, rtol=1e-5, atol=1e-7)


class MeasuresAndClips(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms = grad_norm(self, 2)
        self.log_dict(self.norms)
        self.norms["of all"] = torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "tp"])
def test_gradients_that_a_hook_measures_and_clips_are_those_of_one_device(strategy: str) -> None:
    def fit(ranks: int, make: Callable[[], Any]) -> dict[str, float]:
        trainer = trainer_with(make(), devices=ranks)
        trainer.fit(module := MeasuresAndClips(), small_loader())
        assert module.norms.keys() - {"of all"} <= trainer.callback_metrics.keys()
        weights = {name: float(weight.detach().norm()) for name, weight in module.named_parameters()}
        return {name: float(norm) for name, norm in module.norms.items()} | weights

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
            trainer_with(MAKE[strategy]()).fit(JoinsParameters(), small_loader())

    run_on_ranks(fit, 2)


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
    trainer = trainer_with(make(start_method="fork"))
    trainer.fit(module := Net(), small_loader())
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
            losses_of(Penalizes(), 2, MAKE[strategy]())
        return losses_of(PenalizesWhole(), 2, MAKE[strategy]())

    plain = run_on_ranks(lambda: losses_of(Penalizes()), 1)[0]
    for losses in run_on_ranks(fit, 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class CallsForward(Net):
    """Calls what its blocks do, and not the blocks, which goes past what gathers their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block.forward(x)
        return super().forward(x)


def test_the_module_whose_parameters_were_not_gathered_is_named():
    def fit() -> None:
        said = r"`training_step`, in `blocks.0.0`, computes with a parameter .*call blocks, not their `forward`"
        with pytest.raises(MisconfigurationException, match=said):
            losses_of(CallsForward(), 2, MAKE["zero3"]())

    run_on_ranks(fit, 2)


class RaisesInBackward(PenalizesWhole):
    def on_before_backward(self, loss: torch.Tensor) -> None:
        raise KeyError("of the user's")


@pytest.mark.parametrize("strategy", ["zero3", "tp"])
def test_the_error_of_a_step_is_what_comes_out_when_ranks_keep_their_parts(strategy: str) -> None:
    def fit() -> None:
        with pytest.raises(KeyError, match="of the user's"):
            losses_of(RaisesInBackward(), 2, MAKE[strategy]())

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
        trainer_with(make(), devices=ranks).fit(module := TwoByHand(), small_loader())
        return [weight.detach().numpy() for weight in module.parameters()]

    plain = run_on_ranks(lambda: fit(1, lambda: "auto"), 1)[0]
    for weights in run_on_ranks(lambda: fit(2, MAKE[strategy]), 2):
        for ours, theirs in zip(weights, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class HasLazyLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.LazyLinear(32)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "tp", "pp"])
def test_layers_without_shapes_are_refused_by_name_and_train_once_a_batch_ran_through_them(strategy: str) -> None:
    def run_one_batch() -> HasLazyLayers:
        module = HasLazyLayers()
        torch.manual_seed(0)
        module(torch.zeros(1, 16))
        return module

    def fit() -> list[float]:
        with pytest.raises(MisconfigurationException, match=r"Strategy: `net.2.weight` .*LazyLinear.* run a batch"):
            losses_of(HasLazyLayers(), 2, MAKE[strategy]())
        return losses_of(run_one_batch(), 2, MAKE[strategy]())

    plain = run_on_ranks(lambda: losses_of(run_one_batch()), 1)[0]
    for losses in run_on_ranks(fit, 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class HasOddTensors(Net):
    """Buffers and parameters that share elements, are transposed, or are of types that few collectives know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((1,), 0.5).expand(4))
        self.register_buffer("order", torch.arange(6).view(2, 3).t())
        self.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))
        self.mixer = nn.Linear(16, 16, bias=False)
        self.mixer.weight = nn.Parameter(torch.randn(16, 16).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.mixer(x)) * self.mask


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "tp", "pp"])
def test_odd_tensors_reach_every_rank(strategy: str) -> None:
    def fit() -> list[float]:
        module = HasOddTensors()
        if strategy != "ddp":  # torch's has no 16-bit integers
            module.register_buffer("short", torch.arange(6, dtype=torch.int16))
        return losses_of(module, 2, MAKE[strategy]())

    plain = run_on_ranks(lambda: losses_of(HasOddTensors()), 1)[0]
    for losses in run_on_ranks(fit, 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


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
    dataset = small_loader().dataset
    make_loaders: list[Callable[[], DataLoader]] = [
        lambda: DataLoader(dataset, batch_size=8),
        lambda: DataLoader(dataset, batch_size=8, sampler=Backwards(dataset)),
        lambda: DataLoader(dataset, batch_size=8, shuffle=True),
    ]

    def fit(ranks: int, make: Callable[[], Any]) -> list[list[float]]:
        seen = []
        for make_loader in make_loaders:
            trainer = trainer_with(make(), devices=ranks, use_distributed_sampler=True)
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


class Slices(Net):
    """Takes its layers apart in every other step, for what a layer between them returns."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 2:
            return super().training_step(batch, batch_idx)
        hidden = self.net[:-2](batch[0])
        return F.cross_entropy(self.net[-2:](hidden), batch[1]) + hidden.square().mean()


def test_slices_of_a_container_whose_layers_are_split_train_as_on_one_device() -> None:
    plain = run_on_ranks(lambda: losses_of(Slices()), 1)[0]
    for losses in run_on_ranks(lambda: losses_of(Slices(), 2, MAKE["tp"]()), 2):
        assert losses == pytest.approx(plain, rel=1e-4)


class EndsEpochs(Net):
    """Leaves its first epoch in the middle of a window of accumulated batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 0 and batch_idx == 2 else None


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_gradients_of_a_window_that_a_hook_left_are_not_in_the_next(name: str) -> None:
    plain = run_on_ranks(lambda: losses_of(EndsEpochs(), accumulate_grad_batches=3), 1)[0]
    for losses in run_on_ranks(lambda: losses_of(EndsEpochs(), 2, MAKE[name](), accumulate_grad_batches=3), 2):
        assert losses == pytest.approx(plain, rel=1e-4)


class MakesStateAtOnce(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


def test_an_optimizer_that_makes_its_state_before_the_first_step_trains_in_a_pipeline() -> None:
    plain = run_on_ranks(lambda: losses_of(MakesStateAtOnce()), 1)[0]
    for losses in run_on_ranks(lambda: losses_of(MakesStateAtOnce(), 2, MAKE["pp"]()), 2):
        assert losses == pytest.approx(plain, rel=1e-4)


class HooksAtOnce(Net):
    """Halves the gradient of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].weight.register_hook(lambda gradient: gradient / 2)


class HooksLater(Net):
    def on_fit_start(self) -> None:
        self.net[2].weight.register_hook(lambda gradient: gradient / 2)


@pytest.mark.parametrize(("strategy", "module"), [("zero1", HooksAtOnce), ("tp", HooksAtOnce), ("zero3", HooksLater)])
def test_hooks_of_gradients_of_what_ranks_hold_parts_of_are_refused_by_name(strategy: str, module: type[Net]) -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match=r"`net.2.weight` .* a hook of its gradient"):
            trainer_with(MAKE[strategy]()).fit(module(), small_loader())

    run_on_ranks(fit, 2)


class PenalizesGradients(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].requires_grad_()
        logits = self(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + gradient.square().mean()


def test_a_penalty_on_gradients_trains_as_on_one_device_or_is_refused() -> None:
    plain = run_on_ranks(lambda: losses_of(PenalizesGradients()), 1)[0]
    for losses in run_on_ranks(lambda: losses_of(PenalizesGradients(), 2, MAKE["zero3"]()), 2):
        assert losses == pytest.approx(plain, rel=1e-4)

    def refused() -> None:
        with pytest.raises(MisconfigurationException, match="the step differentiates a gradient"):
            losses_of(PenalizesGradients(), 2, MAKE["tp"]())

    run_on_ranks(refused, 2)


class LooksUpSparsely(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table((x[:, 0] > 0).long()))


def test_sparse_gradients_are_refused_by_name_where_they_would_be_dealt_out() -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match="`table` has `sparse=True`"):
            trainer_with(MAKE["zero1"]()).fit(LooksUpSparsely(), small_loader())

    run_on_ranks(fit, 2)


class CallsInHook(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def test_a_model_that_a_hook_calls_is_refused_by_name_where_ranks_hold_some_of_its_layers() -> None:
    def fit() -> None:
        with pytest.raises(ValueError, match=r"`net.\d` was called outside of a step, and this rank holds nothing"):
            trainer_with(MAKE["pp"]()).fit(CallsInHook(), small_loader())

    run_on_ranks(fit, 2, deadline_seconds=30)


class HasAuxiliaryHead(Net):
    """Has a second loss in every other step, and none when it validates."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(32, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.net[:-1](batch[0])
        loss = F.cross_entropy(self.net[-1](hidden), batch[1])
        return loss if batch_idx % 2 else loss + F.cross_entropy(self.auxiliary(hidden), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_a_head_that_some_steps_leave_out_trains_in_a_pipeline_as_on_one_device() -> None:
    def fit(ranks: int, make: Callable[[], Any]) -> tuple[float, list[np.ndarray]]:
        trainer = trainer_with(make(), devices=ranks)
        trainer.fit(module := HasAuxiliaryHead(), small_loader(4), small_loader(2))
        return float(trainer.callback_metrics["loss"]), [p.detach().numpy() for p in module.parameters()]

    ((plain_loss, plain),) = run_on_ranks(lambda: fit(1, lambda: "auto"), 1)
    for loss, weights in run_on_ranks(lambda: fit(2, MAKE["pp"]), 2):
        assert loss == pytest.approx(plain_loss, rel=1e-4)
        for ours, theirs in zip(weights, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class HasViews(Net):
    """Reads a row of its weight through a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(16, 16)
        self.register_buffer("row", self.mixer.weight.detach()[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.mixer(x) + self.row)


@pytest.mark.parametrize("strategy", ["zero1", "tp"])
def test_buffers_that_are_views_of_what_is_dealt_out_are_refused_by_name(strategy: str) -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match=r"`row` is a view of the parameter `mixer.weight`"):
            trainer_with(MAKE[strategy]()).fit(HasViews(), small_loader())

    run_on_ranks(fit, 2)
