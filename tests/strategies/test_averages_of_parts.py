"""Lightning's averages of weights where ranks hold parts: weights, metrics and checkpoints of one device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

import lightning_memopt as memopt
from lightning_memopt.checkpoints.consolidate import consolidate
from lightning_memopt.parallel.local import local_of
from tests.distributed import run_on_ranks
from tests.resuming import SavesAt, Validations
from tests.strategies.parity import CASES, Outcome, assert_same_outcome, fit_zoo
from tests.strategies.test_in_backward_shards import ZOO_NAMES, Wide
from tests.strategies.users import MAKE, Net, small_loader, trainer_with
from tests.zoo import ZOO

pytestmark = pytest.mark.distributed


class _SavesAtEpochEnd(pl.Callback):
    def __init__(self, path: Path, epoch: int = 0) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(33, 66), nn.Linear(66, 33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Tied(pl.LightningModule):
    """Odd sizes, tied weights, a scalar and a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inlet, self.mirror = nn.Linear(16, 33), nn.Linear(16, 33)
        self.mirror.weight = self.inlet.weight
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.outlet = nn.Linear(33, 4)
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inlet(x) + self.mirror(x.cos())
        for block in self.blocks:
            hidden = block(hidden)
        return self.outlet(hidden) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def _ema() -> WeightAveraging:
    return EMAWeightAveraging(decay=0.8)


AVERAGES: dict[str, Callable[[], WeightAveraging]] = {
    "EMA": _ema,
    "equal": WeightAveraging,
    "several at once": lambda: WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(0.8)),
    "each epoch": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0),
}
STRATEGIES: dict[str, tuple[int, Callable[[], Any]]] = {
    "one device": (1, lambda: "auto"),
    **{name: (2, MAKE[name]) for name in ("ddp", "zero1", "zero2", "zero3", "tp", "pp")},
    "zero3_offload": (2, lambda: memopt.DataParallelStrategy("parameters", offload=True)),
    "shard x tensor": (4, lambda: memopt.HybridStrategy(shard=2, tensor=2)),
    "data x shard": (4, lambda: memopt.HybridStrategy(data=2, shard=2)),
    "pipeline x shard": (4, lambda: memopt.HybridStrategy(pipeline=2, shard=2)),
}


def _trainer(strategy: str, average: pl.Callback, save: str = "full", **options: Any) -> pl.Trainer:
    devices, make = STRATEGIES[strategy]
    made = make()
    if devices > 1:
        made.save = save
    usual: dict[str, Any] = {"max_epochs": 3, "callbacks": [average, *options.pop("extra", ())]}
    return trainer_with(made, devices=devices, **(usual | options))


def _fit(trainer: pl.Trainer, module: pl.LightningModule | None = None, **options: Any) -> pl.LightningModule:
    module = module or Tied()
    trainer.fit(module, small_loader(), small_loader(2), **options)
    return module


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _assert_same(checkpoint: Path, other: Path) -> None:
    """The same module states, each under the same names in the same order."""
    expected, found = (torch.load(path, weights_only=True) for path in (checkpoint, other))
    assert found.keys() == expected.keys()
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert list(found[key]) == list(expected[key])
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
    assert found["callbacks"].keys() == expected["callbacks"].keys()


SLOW = [
    pytest.param(*values, marks=pytest.mark.slow)
    for values in [
        *((name, "EMA") for name in STRATEGIES if name not in ("one device", "ddp", "zero3", "tp")),
        *((strategy, name) for strategy in ("zero3", "tp", "pp") for name in AVERAGES if name != "EMA"),
    ]
]


@pytest.mark.parametrize(("strategy", "average"), [("zero3", "EMA"), ("tp", "EMA"), *SLOW])
def test_weights_metrics_and_checkpoints_are_those_of_one_device(strategy: str, average: str, tmp_path: Path) -> None:
    def fit(strategy: str) -> tuple[dict[str, torch.Tensor], Any, Any]:
        seen = Validations()
        saves = SavesAt(tmp_path / f"{strategy}.ckpt", 5)
        trainer = _trainer(strategy, AVERAGES[average](), extra=[seen, saves])
        module = _fit(trainer)
        trainer.save_checkpoint(tmp_path / f"{strategy} after.ckpt")
        (after,) = trainer.validate(module, small_loader(2), verbose=False)
        return _weights(module), seen.seen, after

    (plain,) = run_on_ranks(lambda: fit("one device"), 1)
    for weights, seen, after in run_on_ranks(lambda: fit(strategy), STRATEGIES[strategy][0]):
        torch.testing.assert_close(weights, plain[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen, plain[1], rtol=1e-5, atol=0)
        torch.testing.assert_close(after, plain[2], rtol=1e-5, atol=0)
    for when in ("", " after"):
        _assert_same(tmp_path / f"one device{when}.ckpt", tmp_path / f"{strategy}{when}.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["memopt_zero3", "memopt_tp", "memopt_pp"])
@pytest.mark.parametrize("name", ZOO_NAMES)
def test_averages_of_modules_as_users_write_them_are_those_of_one_device(name: str, strategy: str) -> None:
    case = CASES[strategy]
    ranks = case.sizes.world

    def fit() -> Outcome:
        return fit_zoo(ZOO[name], ranks, 8, sizes=case.sizes, strategy=case.make(), extra=[_ema()])

    plain = run_on_ranks(lambda: fit_zoo(ZOO[name], 1, 8, extra=[_ema()]), 1)[0]
    for outcome in run_on_ranks(fit, ranks):
        assert_same_outcome(plain, outcome)


@pytest.mark.parametrize(
    ("first", "save", "second"),
    [
        ("zero3", "sharded", "zero3"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                ("zero3", "full", "zero3"), ("zero3", "async", "tp"), ("tp", "full", "tp"),
                ("tp", "sharded", "zero3"), ("pp", "full", "pp"), ("pp", "sharded", "pp"),
                ("one device", "full", "zero3"), ("zero3", "full", "one device"),
                ("shard x tensor", "sharded", "shard x tensor"),
                ("ddp", "sharded", "ddp"),
            ]
        ),
    ],
)  # fmt: skip
def test_training_goes_on_with_the_average_of_a_checkpoint(
    first: str, save: str, second: str, tmp_path: Path
) -> None:
    def begin() -> None:
        _fit(_trainer(first, _ema(), save, max_epochs=2, extra=[_SavesAtEpochEnd(tmp_path / "one.ckpt")]))

    def resume() -> dict[str, torch.Tensor]:
        return _weights(_fit(_trainer(second, _ema(), save), ckpt_path=tmp_path / "one.ckpt"))

    (whole,) = run_on_ranks(lambda: _weights(_fit(_trainer("one device", _ema()))), 1)
    run_on_ranks(begin, STRATEGIES[first][0])
    for weights in run_on_ranks(resume, STRATEGIES[second][0]):
        torch.testing.assert_close(weights, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "tp", "pp", "pipeline x shard"])
def test_of_shards_that_ranks_wrote_the_file_of_one_device_is_made(strategy: str, tmp_path: Path) -> None:
    def fit(strategy: str, save: str, path: Path) -> None:
        _fit(_trainer(strategy, _ema(), save, extra=[SavesAt(path, 5)]))

    run_on_ranks(lambda: fit("one device", "full", tmp_path / "plain.ckpt"), 1)
    run_on_ranks(lambda: fit(strategy, "sharded", tmp_path / "shards.ckpt"), STRATEGIES[strategy][0])
    consolidate(tmp_path / "shards.ckpt", tmp_path / "made.ckpt")
    _assert_same(tmp_path / "plain.ckpt", tmp_path / "made.ckpt")
    averages = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(memopt.full_state_dict(tmp_path / "shards.ckpt"), averages, rtol=1e-5, atol=1e-6)


class _Held(pl.Callback):
    """Bytes of the memory that the parameters of an average are in, at the end of training."""

    def __init__(self, average: WeightAveraging) -> None:
        self.average = average
        self.bytes = 0

    def on_train_end(self, trainer: Any, module: Any) -> None:
        model = self.average._average_model
        assert model is not None
        self.bytes = sum(local_of(parameter).untyped_storage().nbytes() for parameter in model.parameters())


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("tp", marks=pytest.mark.slow)])
def test_each_rank_holds_the_average_of_its_part(strategy: str) -> None:
    def held() -> int:
        held = _Held(average := _ema())
        trainer_with(MAKE[strategy](), callbacks=[average, held]).fit(Wide(), small_loader())
        return held.bytes

    half = sum(parameter.nbytes for parameter in Wide().parameters()) / 2
    assert run_on_ranks(held, 2) == [pytest.approx(half, rel=0.02)] * 2


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "HalfPrecision": lambda: {"plugins": [memopt.HalfPrecision("bf16", rounding="kahan")]},
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "tp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_averages_of_other_precisions_are_those_of_one_device(strategy: str, precision: str) -> None:
    def fit(strategy: str) -> dict[str, torch.Tensor]:
        return _weights(_fit(_trainer(strategy, _ema(), **PRECISIONS[precision]())))

    (plain,) = run_on_ranks(lambda: fit("one device"), 1)
    for weights in run_on_ranks(lambda: fit(strategy), 2):
        assert {name: w.dtype for name, w in weights.items()} == {name: w.dtype for name, w in plain.items()}
        torch.testing.assert_close(weights, plain, rtol=2e-2, atol=2e-2)  # bf16 has 8 bits


TOGETHER: dict[str, Callable[[], list[pl.Callback]]] = {
    "OptimizerInBackward": lambda: [memopt.OptimizerInBackward()],
    "GradientAccumulation": lambda: [memopt.GradientAccumulation(2)],
    "MicroBatching": lambda: [memopt.MicroBatching(2)],
    "ActivationCheckpointing": lambda: [memopt.ActivationCheckpointing("full")],
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "tp"])
@pytest.mark.parametrize("name", TOGETHER)
def test_averages_compose_with_what_changes_the_step(strategy: str, name: str) -> None:
    def fit(strategy: str) -> dict[str, torch.Tensor]:
        return _weights(_fit(_trainer(strategy, _ema(), extra=TOGETHER[name]())))

    (plain,) = run_on_ranks(lambda: fit("one device"), 1)
    for weights in run_on_ranks(lambda: fit(strategy), 2):
        torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)


def test_after_training_and_after_an_error_the_callback_is_as_lightning_made_it() -> None:
    class Breaks(Tied):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.trainer.current_epoch == 1:
                raise RuntimeError("broken batch")
            return super().training_step(batch, batch_idx)

    def fit() -> None:
        for module in (Tied(), Breaks()):
            average = _ema()
            trainer = _trainer("zero3", average)
            if isinstance(module, Breaks):
                with pytest.raises(RuntimeError, match="broken batch"):
                    _fit(trainer, module)
            else:
                _fit(trainer, module)
                assert not any(isinstance(parameter, DTensor) for parameter in average._average_model.parameters())
            assert not {"update_parameters", "state_dict"} & vars(average._average_model).keys()
            assert not {"_swap_models", "_copy_average_to_current"} & vars(average).keys()
            assert not module._load_state_dict_pre_hooks

    run_on_ranks(fit, 2)


def test_an_average_of_a_module_without_values_is_refused_by_name() -> None:
    class Late(Net):
        def __init__(self) -> None:
            with torch.device("meta"):
                super().__init__()

    def fit() -> None:
        trainer = _trainer("zero3", StochasticWeightAveraging(0.05, 1))
        with pytest.raises(MisconfigurationException, match=r"The average of `net\.0\.weight` has no values.*meta"):
            trainer.fit(Late(), small_loader())

    run_on_ranks(fit, 2)


class Normalized(Tied):
    """Has SWA count again, at its end, what it normalizes by."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


def _swa(strategy: str, cls: type[Tied], path: Path | None, save: str = "full", **options: Any) -> Any:
    """Weights after five epochs of which the last four are averaged; a checkpoint is made after the third."""
    extra = [_SavesAtEpochEnd(path, 2)] if path else []
    average = StochasticWeightAveraging(0.05, 2, annealing_epochs=1)
    return _weights(_fit(_trainer(strategy, average, save, max_epochs=5, extra=extra), cls(), **options))


@pytest.mark.parametrize(
    ("strategy", "cls", "save"),
    [
        ("zero3", Normalized, "full"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                ("zero1", Normalized, "sharded"), ("zero2", Tied, "full"), ("zero3_offload", Tied, "full"),
                ("tp", Normalized, "full"), ("tp", Tied, "sharded"), ("pp", Tied, "full"), ("pp", Tied, "sharded"),
                ("shard x tensor", Normalized, "full"), ("pipeline x shard", Tied, "full"),
            ]
        ),
    ],
)  # fmt: skip
def test_stochastic_weight_averaging_trains_and_resumes_as_on_one_device(
    strategy: str, cls: type[Tied], save: str, tmp_path: Path
) -> None:
    (plain,) = run_on_ranks(lambda: _swa("one device", cls, tmp_path / "plain.ckpt"), 1)
    ranks = STRATEGIES[strategy][0]
    trained = run_on_ranks(lambda: _swa(strategy, cls, tmp_path / "parts.ckpt", save), ranks)
    resumed = run_on_ranks(lambda: _swa(strategy, cls, None, save, ckpt_path=tmp_path / "parts.ckpt"), ranks)
    for weights in (*trained, *resumed):
        torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)
    if save == "full":
        expected, found = (
            next(state for name, state in torch.load(tmp_path / file)["callbacks"].items() if "Stochastic" in name)
            for file in ("plain.ckpt", "parts.ckpt")
        )
        assert found["n_averaged"] == expected["n_averaged"]
        assert list(found["average_model_state"]) == list(expected["average_model_state"])
        torch.testing.assert_close(
            found["average_model_state"], expected["average_model_state"], rtol=1e-5, atol=1e-6
        )


def test_a_pipeline_refuses_by_name_to_count_statistics_of_batches_again() -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging cannot work here"):
            _swa("pp", Normalized, None)

    run_on_ranks(fit, 2)
