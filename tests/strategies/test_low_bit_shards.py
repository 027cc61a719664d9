"""LowBitOptimizer where ranks hold parts of parameters: each packs the state of what it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import lightning_memopt as memopt
from lightning_memopt.techniques.low_bit import SMALLEST, state_bytes
from tests.distributed import run_on_ranks
from tests.strategies.users import MAKE, Net, small_loader, trainer_with

pytestmark = pytest.mark.distributed


class Wide(Net):
    """Rows of 256, so that the blocks of a rank are blocks of the whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [layer for _ in range(2) for layer in (nn.Linear(256, 256), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), *hidden, nn.Linear(256, 4))


class Odd(Net):
    """Shards of odd sizes, one of them empty, which begin in the middle of a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 301), nn.Tanh(), nn.Linear(301, 301), nn.Tanh(), nn.Linear(301, 4))
        self.scale = nn.Parameter(torch.ones(1, 2 * SMALLEST))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale.mean()


def _trainer(
    make: Callable[[], Any], devices: int, epochs: int, *, bits: Any = 8, engine: Any = "memopt", **options: Any
) -> pl.Trainer:
    return trainer_with(
        make(), devices=devices, max_epochs=epochs, callbacks=[memopt.LowBitOptimizer(bits, engine)],
        gradient_clip_val=0.5, **options,
    )  # fmt: skip


def _weights(module: pl.LightningModule) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def _plain(cls: type[Net], **options: Any) -> list[torch.Tensor]:
    module = cls()
    trainer_with("auto", devices=1, max_epochs=2, gradient_clip_val=0.5, **options).fit(module, small_loader())
    return _weights(module)


def _distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return float(torch.cat([(a - b).flatten() for a, b in zip(some, others, strict=True)]).norm())


def _fit(
    cls: type[Net], make: Callable[[], Any], devices: int, epochs: int = 2, **options: Any
) -> list[torch.Tensor]:
    ckpt = options.pop("ckpt_path", None)
    module = cls()
    _trainer(make, devices, epochs, **options).fit(module, small_loader(), ckpt_path=ckpt)
    return _weights(module)


@pytest.mark.parametrize(
    ("strategy", "engine"),
    [
        pytest.param("zero1", "memopt", marks=pytest.mark.slow),
        ("zero3", "memopt"),
        ("zero3", "bitsandbytes"),
        pytest.param("zero3", "torchao", marks=pytest.mark.slow),
    ],
)
def test_state_in_8_bits_of_shards_is_that_of_whole_parameters_where_blocks_are_the_same(
    strategy: str, engine: str
) -> None:
    seconds = 240 if engine == "torchao" else 60  # it compiles, in threads that no later test may be forked beside
    (plain,) = run_on_ranks(lambda: _fit(Wide, lambda: "auto", 1, engine=engine), 1, deadline_seconds=seconds)
    for weights in run_on_ranks(lambda: _fit(Wide, MAKE[strategy], 2, engine=engine), 2, deadline_seconds=seconds):
        # A sum in another order may take an element over to the next level.
        far = sum(
            int((~torch.isclose(a, b, rtol=1e-5, atol=1e-6)).sum()) for a, b in zip(weights, plain, strict=True)
        )
        assert far < 20 and _distance(weights, plain) < 1e-3


@pytest.mark.parametrize(
    ("strategy", "bits", "engine"),
    [
        ("zero3", 8, "memopt"),
        ("tp", 8, "memopt"),
        pytest.param("zero3", 4, "memopt", marks=pytest.mark.slow),
        pytest.param("zero3", "fp8", "memopt", marks=pytest.mark.slow),
        pytest.param("zero3", 8, "bitsandbytes", marks=pytest.mark.slow),
        pytest.param("tp", 8, "bitsandbytes", marks=pytest.mark.slow),
    ],
)
def test_blocks_of_other_sizes_lose_no_more_than_those_of_one_device(strategy: str, bits: Any, engine: str) -> None:
    exact, one_device = _plain(Odd), _fit(Odd, lambda: "auto", 1, bits=bits, engine=engine)
    for weights in run_on_ranks(lambda: _fit(Odd, MAKE[strategy], 2, bits=bits, engine=engine), 2):
        assert 0 < _distance(weights, exact) < 1.5 * _distance(one_device, exact)


def test_each_rank_holds_a_quarter_of_its_part_of_the_state() -> None:
    def held() -> tuple[int, int]:
        module, sizes = Wide(), []

        class Size(pl.Callback):
            def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                sizes.append(state_bytes(trainer.optimizers[0]))

        trainer = _trainer(MAKE["zero3"], 2, 1)
        trainer.callbacks.append(Size())
        trainer.fit(module, small_loader())
        return sizes[0], sum(p.nbytes for p in module.parameters())

    for held_bytes, parameter_bytes in run_on_ranks(held, 2):
        assert held_bytes < 0.28 * 2 * parameter_bytes / 2  # with those of biases and the head


@pytest.mark.parametrize(
    ("strategy", "save", "engine"),
    [
        ("zero3", "full", "memopt"),
        pytest.param("zero3", "sharded", "memopt", marks=pytest.mark.slow),
        pytest.param("tp", "full", "memopt", marks=pytest.mark.slow),
        pytest.param("zero3", "full", "bitsandbytes", marks=pytest.mark.slow),
        pytest.param("zero3", "sharded", "bitsandbytes", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    strategy: str, save: str, engine: str, tmp_path: Path
) -> None:
    def make() -> Any:
        made = MAKE[strategy]()
        made.save = save
        return made

    def resumed() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        whole = _fit(Odd, make, 2, engine=engine)
        trainer = _trainer(make, 2, 1, engine=engine)
        trainer.fit(Odd(), small_loader())
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        return whole, _fit(Odd, make, 2, engine=engine, ckpt_path=tmp_path / "half.ckpt")

    for whole, weights in run_on_ranks(resumed, 2):
        torch.testing.assert_close(weights, whole, rtol=0, atol=0)


def test_checkpoints_go_from_shards_to_one_device_and_back_with_and_without_the_callback(tmp_path: Path) -> None:
    whole = _fit(Wide, lambda: "auto", 1, epochs=3)

    def first() -> None:
        trainer = _trainer(MAKE["zero3"], 2, 1)
        trainer.fit(Wide(), small_loader())
        trainer.save_checkpoint(tmp_path / "shards.ckpt")

    def last() -> list[torch.Tensor]:
        return _fit(Wide, MAKE["zero3"], 2, 3, ckpt_path=tmp_path / "packed.ckpt")

    run_on_ranks(first, 2)
    saved = torch.load(tmp_path / "shards.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert {value["exp_avg"].dtype for value in saved.values()} == {torch.float32}
    trainer = _trainer(lambda: "auto", 1, 2)
    trainer.fit(Wide(), small_loader(), ckpt_path=tmp_path / "shards.ckpt")
    trainer.save_checkpoint(tmp_path / "packed.ckpt")
    for weights in run_on_ranks(last, 2):
        assert _distance(weights, whole) < 1e-3
    trainer = trainer_with("auto", devices=1, max_epochs=3)
    trainer.fit(Wide(), small_loader(), ckpt_path=tmp_path / "shards.ckpt")
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {12.0}


@pytest.mark.parametrize("engine", ["memopt", pytest.param("bitsandbytes", marks=pytest.mark.slow)])
def test_16_bit_weights_of_shards_are_stepped_with_state_in_8_bits(engine: str) -> None:
    def half() -> dict[str, Any]:
        return {"plugins": [memopt.HalfPrecision("bf16", rounding="kahan")], "engine": engine}

    exact, one_device = _plain(Odd, plugins=half()["plugins"]), _fit(Odd, lambda: "auto", 1, **half())
    for weights in run_on_ranks(lambda: _fit(Odd, MAKE["zero3"], 2, **half()), 2):
        assert 0 < _distance(weights, exact) < 1.5 * _distance(one_device, exact)


@pytest.mark.slow
def test_shards_of_tensor_parallel_parts_are_packed_and_saved(tmp_path: Path) -> None:
    def fit() -> list[torch.Tensor]:
        def make() -> Any:
            return memopt.HybridStrategy(shard=2, tensor=2)

        trainer = _trainer(make, 4, 1)
        trainer.fit(Wide(), small_loader())
        trainer.save_checkpoint(tmp_path / "hybrid.ckpt")
        return _fit(Wide, make, 4, ckpt_path=tmp_path / "hybrid.ckpt")

    exact, one_device = _plain(Wide), _fit(Wide, lambda: "auto", 1)
    for weights in run_on_ranks(fit, 4):
        assert 0 < _distance(weights, exact) < 1.5 * _distance(one_device, exact)


def test_after_training_the_state_is_shards_again() -> None:
    def kinds() -> set[type]:
        trainer = _trainer(MAKE["zero3"], 2, 1)
        trainer.fit(Wide(), small_loader())
        return {type(state["exp_avg"]) for state in trainer.optimizers[0].state.values()}

    assert run_on_ranks(kinds, 2) == [{DTensor}, {DTensor}]
