"""LowBitOptimizer with the kernels of bitsandbytes and torchao under Lightning."""

import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_memopt as memopt
from lightning_memopt import LowBitOptimizer, OptimizerInBackward
from lightning_memopt.techniques.blockwise import as_packed
from tests.parity import assert_same_training, quiet_trainer, train
from tests.resuming import SavesAt, fit_same_batches
from tests.zoo import ZOO

library = pytest.importorskip("bitsandbytes").optim

LOSS_TOLERANCE = {8: 1e-3, "fp8": 2e-3, 4: 1e-2}
"""Relative difference allowed between the losses of 20 steps with and without low-bit state."""

LIBRARIES = ["bitsandbytes", pytest.param("torchao", marks=pytest.mark.slow)]
TORCHAO = [pytest.param("torchao", bits, marks=pytest.mark.slow) for bits in (8, 4, "fp8")]


class _Net(pl.LightningModule):
    """Weights that are packed, of which one is tied, biases that are not, and a rate that falls."""

    def __init__(self, overflowing: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.overflowing = overflowing
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.net[4].weight = self.net[2].weight

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        return loss * float("inf") if batch_idx == self.overflowing else loss

    def configure_optimizers(self) -> Any:
        slow, fast = self.net[0].parameters(), self.net[2:].parameters()
        groups = [{"params": slow, "lr": 1e-3, "weight_decay": 0.0}, {"params": fast}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        return [optimizer], [{"scheduler": _halving(optimizer), "interval": "step"}]


class _GAN(pl.LightningModule):
    """Two optimizers, stepped by hand, with weights that are packed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16))
        self.critic = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        real, _ = batch
        for optimizer, target in zip(self.optimizers(), (1.0, 0.0), strict=True):
            made = self.critic(self.generator(real.flip(0)))
            loss = nn.functional.binary_cross_entropy_with_logits(made, torch.full_like(made, target))
            if target == 0:
                loss = loss + nn.functional.softplus(-self.critic(real)).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        made = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
        return [made, torch.optim.SGD(self.critic.parameters(), lr=1e-2, momentum=0.9)], []


def _halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


class _Both:
    """The library's optimizer for what is large, and torch's for the rest."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _loader(batches: int = 10) -> Any:
    return ZOO["mlp"].loader(batches=batches)


def _bitsandbytes() -> LowBitOptimizer:
    return LowBitOptimizer(8, engine="bitsandbytes")


def _plain_loop(clip: float, window: int) -> nn.Module:
    """Ten steps with bitsandbytes' own optimizer for the large weight, as one writes them without Lightning."""
    module = _Net()
    torch.manual_seed(0)
    large = module.net[2].weight
    small = [parameter for parameter in module.net[2:].parameters() if parameter is not large]
    optimizers = [
        library.AdamW8bit([large], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(
            [{"params": module.net[0].parameters(), "lr": 1e-3, "weight_decay": 0.0}, {"params": small}],
            lr=1e-2, weight_decay=0.1,
        ),
    ]  # fmt: skip
    schedulers = [_halving(optimizer) for optimizer in optimizers]
    for number, batch in enumerate(_loader(10 * window), start=1):
        (module.training_step(batch, number) / window).backward()
        if number % window == 0:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            for each in (*optimizers, *schedulers):
                each.step()
            module.zero_grad()
    return module


def test_training_is_that_of_a_plain_loop_with_the_optimizer_of_bitsandbytes():
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "steps": 10}
    run = train(_Net(), _loader(20), callbacks=[_bitsandbytes()], seed=0, **options)
    expected = _plain_loop(clip=0.5, window=2).state_dict()
    torch.testing.assert_close(run.weights, dict(expected), rtol=0, atol=0)
    assert not torch.equal(run.weights["net.2.weight"], _Net().net[2].weight)


def test_two_optimizers_that_the_module_steps_itself_are_those_of_a_plain_loop():
    module = _GAN()
    train(module, _loader(), steps=20, callbacks=[_bitsandbytes()], seed=0)
    expected = _GAN()
    large = {parameter for parameter in expected.parameters() if parameter.numel() >= 4096}
    assert len(large) == 3
    optimizers = []
    for part, kind, theirs, options in (
        (expected.generator, torch.optim.Adam, library.Adam8bit, {"lr": 1e-3, "betas": (0.5, 0.9)}),
        (expected.critic, torch.optim.SGD, library.SGD8bit, {"lr": 1e-2, "momentum": 0.9}),
    ):
        own = list(part.parameters())
        packed, rest = ([p for p in own if (p in large) == is_packed] for is_packed in (True, False))
        optimizers.append(_Both(theirs(packed, **options), kind(rest, **options)))
    expected.optimizers = lambda: optimizers
    expected.manual_backward = torch.Tensor.backward
    for number, batch in enumerate(_loader()):
        expected.training_step(batch, number)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("engine", "bits"), [("bitsandbytes", 8), *TORCHAO])
def test_training_follows_the_plain_trainer(engine, bits):
    entry = ZOO["gpt2"]
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    plain = train(entry.build(), entry.loader(), steps=10, **options)
    held = train(entry.build(), entry.loader(), steps=10, callbacks=[LowBitOptimizer(bits, engine=engine)], **options)
    torch.testing.assert_close(held.losses, plain.losses, rtol=LOSS_TOLERANCE[bits], atol=0)
    assert list(held.weights) == list(plain.weights)


@pytest.mark.parametrize("engine", LIBRARIES)
@pytest.mark.parametrize("first", [True, False])
def test_with_the_optimizer_in_the_backward_in_either_order_the_numbers_are_the_same(first, engine):
    alone = train(_Net(), _loader(), steps=10, callbacks=[LowBitOptimizer(8, engine)])
    both = [LowBitOptimizer(8, engine), OptimizerInBackward()]
    together = train(_Net(), _loader(), steps=10, callbacks=both if first else both[::-1])
    assert_same_training(alone, together, rtol=0, atol=0)


@pytest.mark.slow
def test_a_monitor_watches_the_compiled_step_and_changes_nothing(tmp_path):
    pytest.importorskip("torchao")
    alone = train(_Net(), _loader(), steps=10, callbacks=[LowBitOptimizer(8, "torchao")])
    both = [LowBitOptimizer(8, "torchao"), memopt.MemoryMonitor(every_n_steps=2, dirpath=tmp_path)]
    assert_same_training(alone, train(_Net(), _loader(), steps=10, callbacks=both), rtol=0, atol=0)


@pytest.mark.parametrize("engine", LIBRARIES)
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_16_bit_weights_are_stepped_in_float32(rounding, engine):
    def plugins() -> list[Any]:
        return [memopt.HalfPrecision("bf16", rounding=rounding)]

    plain = train(_Net(), _loader(), steps=10, plugins=plugins())
    held = train(_Net(), _loader(), steps=10, plugins=plugins(), callbacks=[LowBitOptimizer(8, engine)])
    torch.testing.assert_close(held.losses, plain.losses, rtol=0.01, atol=0)


@pytest.mark.parametrize("engine", LIBRARIES)
def test_a_step_that_a_loss_scale_skips_is_skipped(engine):
    plugin = memopt.MixedPrecision("fp16", initial_scale=256.0)
    callbacks = [LowBitOptimizer(8, engine)]
    run = train(_Net(overflowing=2), _loader(), steps=10, plugins=[plugin], callbacks=callbacks)
    assert plugin.state_dict()["skipped_steps"] == 1
    assert {float(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {9.0}
    assert all(weight.isfinite().all() for weight in run.weights.values())


def test_the_optimizer_is_as_the_user_made_it_after_fit():
    run = train(_Net(), _loader(), steps=3, callbacks=[_bitsandbytes()])
    optimizer = run.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    assert run.trainer.lr_scheduler_configs[0].scheduler.optimizer is optimizer
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not any("low_bit" in str(getattr(value, "__func__", "")) for value in vars(optimizer).values())


@pytest.mark.parametrize(("engine", "bits"), [("bitsandbytes", 8), *TORCHAO])
def test_a_checkpoint_of_mid_epoch_resumes_bit_for_bit(engine, bits, tmp_path):
    def fit(*callbacks: pl.Callback, **options: Any) -> dict[str, torch.Tensor]:
        held = LowBitOptimizer(bits, engine=engine)
        return fit_same_batches(ZOO["mlp"], 12, held, *callbacks, **options).state_dict()

    whole = fit(SavesAt(tmp_path / "five.ckpt", 5))
    saved = torch.load(tmp_path / "five.ckpt", weights_only=True)
    (packed,) = saved["low_bit_optimizer_states"]
    assert packed and all(as_packed(state["exp_avg"]) for state in packed.values())
    torch.testing.assert_close(fit(ckpt_path=tmp_path / "five.ckpt"), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [([], [_bitsandbytes]), ([LowBitOptimizer], [_bitsandbytes]), ([_bitsandbytes], [LowBitOptimizer])],
)
def test_a_checkpoint_of_another_engine_or_of_none_is_converted(saved_by, resumed_by, tmp_path):
    quiet_trainer(5, SavesAt(tmp_path / "five.ckpt", 5), *(make() for make in saved_by)).fit(_Net(), _loader())
    trainer = quiet_trainer(10, *(make() for make in resumed_by))
    trainer.fit(_Net(), _loader(), ckpt_path=tmp_path / "five.ckpt")
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {10.0}


def test_the_predicted_memory_of_bitsandbytes_is_what_is_measured():
    class Wide(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 512), nn.Linear(512, 64))

    batch = ZOO["mlp"].batch()
    predicted = memopt.predict_memory(Wide, batch, callbacks=[_bitsandbytes()])
    measured = memopt.measure_memory(Wide, batch, callbacks=[_bitsandbytes()])
    plain = memopt.predict_memory(Wide, batch)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert predicted.by_category["optimizer_state"] < 0.27 * plain.by_category["optimizer_state"]


@pytest.mark.parametrize("look", [memopt.predict_memory, memopt.measure_memory])
def test_the_memory_of_torchao_can_be_neither_predicted_nor_measured_by_operator_and_that_is_said(look):
    pytest.importorskip("torchao")
    with pytest.raises(MisconfigurationException, match=r"torchao compiles its step.*default engine \('memopt'\)"):
        look(_Net, ZOO["mlp"].batch(), callbacks=[LowBitOptimizer(8, engine="torchao")])


def test_torchao_is_refused_for_sgd_before_the_first_step():
    class WithSGD(_Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    with pytest.raises(MisconfigurationException, match=r"LowBitOptimizer cannot work here: .* is SGD, and torchao"):
        quiet_trainer(2, LowBitOptimizer(8, engine="torchao")).fit(WithSGD(), _loader())


def test_a_missing_library_is_named_before_the_first_step_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MisconfigurationException, match=r"pip install 'lightning-memopt\[quantize\]'"):
        quiet_trainer(2, _bitsandbytes()).fit(_Net(), _loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "engine": "bitsandbytes"}, "bits=4 .*possible are 8"),
        ({"engine": "apex"}, "engine='apex' is unknown; possible are 'memopt', 'bitsandbytes', 'torchao'"),
    ],
)
def test_what_no_engine_does_is_refused_when_it_is_given(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        LowBitOptimizer(**options)
