"""OptimizerInBackward where ranks hold parts of parameters: each steps its own, once their gradient is reduced."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.parity import CASES, Case, Outcome, assert_same_outcome, fit_zoo
from tests.strategies.test_users_callbacks import _Frozen, _Thaw
from tests.strategies.users import MAKE, Checkpoints, Net, losses_of, small_loader, trainer_with
from tests.zoo import ZOO, Entry

pytestmark = pytest.mark.distributed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(33)
        self.first, self.second = nn.Linear(33, 66), nn.Linear(66, 33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(self.norm(x))))


class Everything(pl.LightningModule):
    """Odd sizes, tied weights, a block that is called twice, a scalar, a parameter without gradient, two groups."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inlet, self.mirror = nn.Linear(16, 33), nn.Linear(16, 33)
        self.mirror.weight = self.inlet.weight
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.outlet = nn.Linear(33, 4)
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.unused = nn.Parameter(torch.ones(5))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        hidden = self.inlet(x) + self.mirror(x.cos())
        for block in (*self.blocks, self.blocks[1]):
            hidden = block(hidden)
        return F.cross_entropy(self.outlet(hidden) * self.scale, y)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "lr": 0.02},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


EVERYTHING = Entry("everything", Everything, ZOO["mlp"].sample)
SEQUENCE = Case(
    MeshSizes(tensor=2), lambda: memopt.TensorParallelStrategy(sequence_parallel=True, loss_parallel=True)
)


class _HoldsNoGradient(Callback):
    """Fails where gradients are left after the backward, as they are where nothing steps in it."""

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        assert all(parameter.grad is None for parameter in module.parameters())


def _assert_as_one_device(entry: Entry, case: Case, **options: Any) -> None:
    """The run on ranks steps in the backward, that on one device after it."""
    usual: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None, **options}
    ranks = case.sizes.world

    def fit() -> Any:
        extra = [memopt.OptimizerInBackward(), _HoldsNoGradient()]
        return fit_zoo(entry, ranks, 8, sizes=case.sizes, strategy=case.make(), extra=extra, **usual)

    plain = run_on_ranks(lambda: fit_zoo(entry, 1, 8, **usual), 1)[0]
    for outcome in run_on_ranks(fit, ranks):
        np.testing.assert_allclose(outcome.losses, plain.losses, rtol=1e-5)
        assert list(outcome.weights) == list(plain.weights)
        for name, weight in plain.weights.items():
            np.testing.assert_allclose(outcome.weights[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "strategy",
    [
        "memopt_zero3",
        "memopt_tp",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "memopt_zero1", "memopt_zero2", "memopt_zero3_offload",
                "hybrid: shard x tensor", "hybrid: data x shard", "hybrid: data x tensor",
            )
        ),
    ],
)  # fmt: skip
def test_weights_are_those_of_one_device_whose_optimizer_steps_after_the_backward(strategy: str) -> None:
    _assert_as_one_device(EVERYTHING, CASES[strategy])


ZOO_NAMES = ("late_mlp", "lstm", "shared_block", "encoder", "gpt2", "llama", "bert_qa", "t5")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["memopt_zero3", "hybrid: shard x tensor"])
@pytest.mark.parametrize("name", ZOO_NAMES)
def test_modules_as_users_write_them_train_as_on_one_device(name: str, strategy: str) -> None:
    case, options = CASES[strategy], {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    ranks = case.sizes.world

    def fit() -> Outcome:
        extra = [memopt.OptimizerInBackward()]
        return fit_zoo(ZOO[name], ranks, 8, sizes=case.sizes, strategy=case.make(), extra=extra, **options)

    plain = run_on_ranks(lambda: fit_zoo(ZOO[name], 1, 8, **options), 1)[0]
    for outcome in run_on_ranks(fit, ranks):
        assert not outcome.grad_norms.any()  # they are gone
        assert_same_outcome(replace(plain, grad_norms=outcome.grad_norms), outcome)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["memopt_zero3", "hybrid: shard x tensor"])
def test_values_are_clipped_after_gradients_are_reduced(strategy: str) -> None:
    _assert_as_one_device(EVERYTHING, CASES[strategy], gradient_clip_val=0.003, gradient_clip_algorithm="value")


def _llama_with_sgd(dropout: float) -> pl.LightningModule:
    module = ZOO["llama"].make(dropout)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    return module


@pytest.mark.slow
def test_norms_of_a_split_sequence_are_stepped_with_the_gradients_of_all_tokens() -> None:
    _assert_as_one_device(Entry("llama", _llama_with_sgd, ZOO["llama"].sample), SEQUENCE)


class Wide(Net):
    """Blocks of a size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)]
        self.net = nn.Sequential(nn.Linear(16, 256), *hidden, nn.Linear(256, 4))


def _step_bytes(strategy: str, *callbacks: Callback) -> tuple[int, int]:
    """This rank's peak and the most bytes of gradients at once, in one step."""
    report = memopt.measure_memory(
        Wide(), next(iter(small_loader())), strategy=MAKE[strategy](), devices=2, callbacks=list(callbacks)
    )
    return report.peak_bytes, max(point.by_category["gradients"] for point in report.timeline)


@pytest.mark.parametrize(
    "strategy", ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp", "zero2"))]
)
def test_a_rank_holds_the_gradients_of_two_blocks_instead_of_all(strategy: str) -> None:
    held = sum(parameter.nbytes for parameter in Wide().parameters()) / 2  # of each rank
    plain = run_on_ranks(lambda: _step_bytes(strategy), 2)
    assert all(gradients > 0.98 * held for _, gradients in plain)
    stepping = run_on_ranks(lambda: _step_bytes(strategy, memopt.OptimizerInBackward()), 2)
    assert all(gradients < 1.05 * held / 4 for _, gradients in stepping)
    # By how much is a matter of chance: what threads of gloo drop last is not seen to be released.
    assert max(stepping)[0] < min(plain)[0]


def _fit(
    module: pl.LightningModule, make: Callable[[], Any], devices: int, epochs: int = 2, **options: Any
) -> list[torch.Tensor]:
    ckpt = options.pop("ckpt_path", None)
    callbacks = [memopt.OptimizerInBackward(), *options.pop("callbacks", ())]
    trainer = trainer_with(make(), devices=devices, max_epochs=epochs, callbacks=callbacks, **options)
    trainer.fit(module, small_loader(), ckpt_path=ckpt)
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize(
    ("strategy", "save"),
    [
        ("zero3", "full"),
        pytest.param("zero3", "sharded", marks=pytest.mark.slow),
        pytest.param("tp", "full", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    strategy: str, save: str, tmp_path: Path
) -> None:
    def make() -> Any:
        made = MAKE[strategy]()
        made.save = save
        return made

    def resumed() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        whole = _fit(Net(), make, 2)
        trainer = trainer_with(make(), max_epochs=1, callbacks=[memopt.OptimizerInBackward()])
        trainer.fit(Net(), small_loader())
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        return whole, _fit(Net(), make, 2, ckpt_path=tmp_path / "half.ckpt")

    for whole, weights in run_on_ranks(resumed, 2):
        torch.testing.assert_close(weights, whole, rtol=0, atol=0)


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "MixedPrecision": lambda: {"plugins": [memopt.MixedPrecision("bf16")]},
    "HalfPrecision": lambda: {"plugins": [memopt.HalfPrecision("bf16", rounding="kahan")]},
    "LowBitOptimizer": lambda: {"callbacks": [memopt.LowBitOptimizer(8)]},
    "LowBitOptimizer of bitsandbytes": lambda: {"callbacks": [memopt.LowBitOptimizer(8, "bitsandbytes")]},
    "low bits of halves": lambda: {
        "plugins": [memopt.HalfPrecision("bf16", rounding="kahan")], "callbacks": [memopt.LowBitOptimizer(4)],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "tp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_steps_one_parameter_at_a_time_in_another_precision_composes(strategy: str, precision: str) -> None:
    def both() -> list[list[torch.Tensor]]:
        weights = []
        for callbacks in ([], [memopt.OptimizerInBackward()]):
            options = PRECISIONS[precision]()
            callbacks = [*callbacks, *options.pop("callbacks", ())]
            module = Wide()
            trainer = trainer_with(MAKE[strategy](), max_epochs=2, callbacks=callbacks, **options)
            trainer.fit(module, small_loader())
            weights.append([parameter.detach().clone() for parameter in module.parameters()])
        return weights

    for plain, stepped in run_on_ranks(both, 2):
        torch.testing.assert_close(stepped, plain, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3", "tp"])
def test_layers_that_are_unfrozen_while_training_are_stepped(strategy: str) -> None:
    plain = _fit(_Frozen(), lambda: "auto", 1, callbacks=[_Thaw()])
    for weights in run_on_ranks(lambda: _fit(_Frozen(), MAKE[strategy], 2, callbacks=[_Thaw()]), 2):
        torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3", "tp"])
def test_blocks_that_are_computed_again_are_stepped_after_that(strategy: str) -> None:
    plain = losses_of(Checkpoints())

    def losses() -> list[float]:
        return losses_of(Checkpoints(), 2, MAKE[strategy](), callbacks=[memopt.OptimizerInBackward()])

    for seen in run_on_ranks(losses, 2):
        np.testing.assert_allclose(seen, plain, rtol=1e-5)


@pytest.mark.slow
def test_an_error_in_the_middle_of_the_backward_leaves_no_hook() -> None:
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("broken backward")

    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            hidden = self.net[:3](batch[0])
            if batch_idx == 1:
                hidden.register_hook(fail)
            return F.cross_entropy(self.net[3:](hidden), batch[1])

    def fit() -> None:
        module = Breaks()
        with pytest.raises(RuntimeError, match="broken backward"):
            _fit(module, MAKE["zero3"], 2)
        assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())

    run_on_ranks(fit, 2)
