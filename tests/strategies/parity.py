"""Train one listed module on one device and on several ranks, on the same global batches, and compare."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import lightning_memopt
from lightning_memopt.parallel.gather import full_on_cpu
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline.torch_stage import CAN_SPLIT_BACKWARD
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.zoo import ZOO, Entry
from tests.zoo.architectures import ARCHITECTURES

MODULES = ZOO | ARCHITECTURES
STRATEGIES = ("memopt_ddp", "memopt_zero1", "memopt_zero2", "memopt_zero3")
STEPS = 20
ACCUMULATE = 2
GLOBAL_BATCH = 8
ROUNDING = 1e-9
"""What two orders of summation make of a gradient, at most, in modules of this size."""
ROUNDING_OF_DOUBLES = ROUNDING * 2.0**-29
can_split_backward = pytest.mark.skipif(
    not CAN_SPLIT_BACKWARD, reason="the torch that is installed cannot split backwards, which zbv needs (2.13 can)"
)


@dataclass(frozen=True)
class Case:
    """A strategy, and how it divides the ranks that it is tried on.

    Attributes:
        sizes: The world size, and which ranks share a batch.
        make: What a user gives as ``Trainer(strategy=...)``.
    """

    sizes: MeshSizes
    make: Callable[[], Any]


def _by_name(name: str, **sizes: int) -> Case:
    return Case(MeshSizes(**sizes), lambda: name)


def _hybrid(**sizes: int) -> Case:
    return Case(MeshSizes(**sizes), lambda: lightning_memopt.HybridStrategy(**sizes))


CASES: dict[str, Case] = {
    "memopt_ddp": _by_name("memopt_ddp", data=2),
    "memopt_zero1": _by_name("memopt_zero1", shard=2),
    "memopt_zero2": _by_name("memopt_zero2", shard=2),
    "memopt_zero3": _by_name("memopt_zero3", shard=2),
    "memopt_zero3_offload": _by_name("memopt_zero3_offload", shard=2),
    "memopt_tp": _by_name("memopt_tp", tensor=2),
    "memopt_pp": _by_name("memopt_pp", pipeline=2),
    "hybrid: shard x tensor": _hybrid(shard=2, tensor=2),
    "hybrid: data x shard": _hybrid(data=2, shard=2),
    "hybrid: data x tensor": _hybrid(data=2, tensor=2),
    "hybrid: pipeline x data": _hybrid(pipeline=2, data=2),
    "hybrid: pipeline x shard": _hybrid(pipeline=2, shard=2),
    "hybrid: pipeline x tensor": _hybrid(pipeline=2, tensor=2),
}
"""What the matrix of parity is made of."""


@dataclass
class Outcome:
    """What one training left, as plain values.

    Attributes:
        losses: Of each batch, the mean over ranks.
        grad_norms: Of each optimizer step, before clipping.
        weights: The final ``state_dict``.
        amplified: By how much AdamW amplifies a rounding error of each element's gradient over all steps; on one
            device only.
    """

    losses: np.ndarray = field(default_factory=lambda: np.empty(0))
    grad_norms: np.ndarray = field(default_factory=lambda: np.empty(0))
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    amplified: dict[str, np.ndarray] = field(default_factory=dict)


class _RecordGradients(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []
        self.amplified: dict[str, torch.Tensor] = {}
        self._largest: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        # Square sums by name, since ranks may hold shards, or other parameters than their neighbours, or the same.
        squares = torch.stack([_square_sum(parameter.grad) for parameter in module.parameters()])
        if trainer.world_size > 1:
            dist.all_reduce(squares, dist.ReduceOp.MAX)
        self.norms.append(float(squares.sum().sqrt()))
        if trainer.world_size == 1:
            gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            for name, gradient in gradients.items():
                largest = self._largest[name] = torch.maximum(
                    self._largest.get(name, torch.zeros(())), gradient.abs()
                )
                step = optimizer.param_groups[0]["lr"] / (largest + optimizer.defaults.get("eps", 1e-8))
                step = step * (gradient != 0)  # nothing is rounded where nothing is added
                self.amplified[name] = self.amplified.get(name, torch.zeros(())) + step


def _square_sum(gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        return torch.zeros(())
    whole = full_on_cpu(gradient)
    return whole.float().square().sum().cpu()


def fit_zoo(
    entry: Entry,
    ranks: int,
    steps: int = STEPS,
    *,
    sizes: MeshSizes | None = None,
    repeat_first_batch: bool = False,
    dropout: float = 0.0,
    extra: Sequence[Callback] = (),
    **options: Any,
) -> Outcome:
    """Fit on ``ranks`` (call it on each): the global batch is the same for any number of them.

    ``sizes`` says which ranks share a batch; by default each has its own.
    """
    sizes = sizes or MeshSizes(data=ranks)
    gradients = _RecordGradients()
    usual: dict[str, Any] = {"gradient_clip_val": 0.5, "accumulate_grad_batches": ACCUMULATE}
    dataset: Dataset = entry.loader(
        batches=1 if repeat_first_batch else steps * ACCUMULATE, batch_size=GLOBAL_BATCH
    ).dataset
    if repeat_first_batch:
        dataset = ConcatDataset([dataset] * steps)
    # Dealt out in turn, so that batch i of all ranks together is batch i of one device.
    batch_of_rank = sizes.batch_of(int(os.environ["LOCAL_RANK"]))
    sampler = DistributedSampler(dataset, sizes.batches, batch_of_rank, shuffle=False)
    own_share = DataLoader(dataset, batch_size=GLOBAL_BATCH // sizes.batches, sampler=sampler)
    run = train(
        entry.build(dropout),
        own_share,
        steps=steps * (1 if entry.automatic else 2),  # Lightning counts a step of each of the GAN's two optimizers
        devices=ranks,
        callbacks=[gradients, *extra],
        use_distributed_sampler=False,
        **((usual if entry.automatic else {}) | options),
    )
    losses = torch.tensor(run.losses)
    if ranks > 1:
        dist.all_reduce(losses)
    weights = {name: weight.float().numpy() for name, weight in run.weights.items()}
    amplified = {name: value.float().numpy() for name, value in gradients.amplified.items()}
    return Outcome(losses.numpy() / ranks, np.array(gradients.norms), weights, amplified)


@cache
def on_one_device(name: str, steps: int = STEPS) -> Outcome:
    return run_on_ranks(lambda: fit_zoo(MODULES[name], 1, steps), 1)[0]


@cache
def in_double_precision(name: str, steps: int = STEPS) -> Outcome:
    return run_on_ranks(lambda: fit_zoo(MODULES[name], 1, steps, precision="64-true"), 1)[0]


@cache
def on_ranks(name: str, strategy: str, steps: int = STEPS, **options: Any) -> tuple[Outcome, ...]:
    """The outcome of each rank under one of ``CASES``."""
    case = CASES[strategy]
    ranks = case.sizes.world
    return tuple(
        run_on_ranks(
            lambda: fit_zoo(MODULES[name], ranks, steps, sizes=case.sizes, strategy=case.make(), **options),
            ranks,
            deadline_seconds=180,
        )
    )


def assert_same_outcome(
    plain: Outcome, other: Outcome, rtol: float = 1e-5, atol: float = 1e-6, rounding: float = ROUNDING
) -> None:
    """Same losses, gradient norms and weights, within what AdamW makes of rounding errors.

    AdamW divides a gradient by its own size, and so its rounding error: where a gradient is small in the first steps,
    or zero in exact arithmetic (the bias of an attention's keys: softmax does not see it), weights differ between
    any two orders of summation. Such elements are few, or the comparison says nothing and fails.
    """
    assert list(other.weights) == list(plain.weights), "state_dict keys changed"
    np.testing.assert_allclose(other.losses, plain.losses, rtol=rtol, atol=atol, err_msg="losses")
    np.testing.assert_allclose(other.grad_norms, plain.grad_norms, rtol=rtol, atol=atol, err_msg="gradient norms")
    loose = 0
    for name, weight in plain.weights.items():
        allowed = rounding * plain.amplified.get(name, np.zeros(()))
        allowed = np.where(allowed > 100 * atol, np.inf, allowed)  # nothing but noise is left of these
        loose += int(np.isinf(allowed).sum())
        excess = np.maximum(np.abs(other.weights[name] - weight) - allowed, 0)
        np.testing.assert_allclose(weight + excess, weight, rtol=rtol, atol=atol, err_msg=name)
    assert loose <= 0.05 * sum(weight.size for weight in plain.weights.values())


class Probe(Callback):
    """Calls a function with the module at a hook and keeps what it returns."""

    def __init__(self, hook: str, function: Any) -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda trainer, module, *args: self.seen.append(function(module)))
