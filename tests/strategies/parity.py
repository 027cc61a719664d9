"""Train one module of the zoo on one device and on several ranks, on the same global batches, and compare."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import lightning_memopt  # noqa: F401  registers the strategies
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.zoo import ZOO, Entry

STRATEGIES = ("memopt_ddp", "memopt_zero1", "memopt_zero2", "memopt_zero3")
STEPS = 20
ACCUMULATE = 2
GLOBAL_BATCH = 8
NOISE = 1e-6


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


CASES: dict[str, Case] = {
    "memopt_ddp": _by_name("memopt_ddp", data=2),
    "memopt_zero1": _by_name("memopt_zero1", shard=2),
    "memopt_zero2": _by_name("memopt_zero2", shard=2),
    "memopt_zero3": _by_name("memopt_zero3", shard=2),
    "memopt_tp": _by_name("memopt_tp", tensor=2),
    "memopt_pp": _by_name("memopt_pp", pipeline=2),
}
"""What the matrix of parity is made of."""


@dataclass
class Outcome:
    """What one training left, as plain values.

    Attributes:
        losses: Of each batch, the mean over ranks.
        grad_norms: Of each optimizer step, before clipping.
        weights: The final ``state_dict``.
        largest_gradients: Of each element of each parameter, the largest magnitude that its gradient had; on one
            device only.
    """

    losses: np.ndarray = field(default_factory=lambda: np.empty(0))
    grad_norms: np.ndarray = field(default_factory=lambda: np.empty(0))
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    largest_gradients: dict[str, np.ndarray] = field(default_factory=dict)


class _RecordGradients(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        # Square sums by name, since ranks may hold shards, or other parameters than their neighbours, or the same.
        squares = torch.stack([_square_sum(parameter.grad) for parameter in module.parameters()])
        if trainer.world_size > 1:
            dist.all_reduce(squares, dist.ReduceOp.MAX)
        self.norms.append(float(squares.sum().sqrt()))
        if trainer.world_size == 1:
            gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            for name, gradient in gradients.items():
                largest = self.largest.get(name, torch.zeros(()))
                self.largest[name] = torch.maximum(largest, gradient.abs())


def _square_sum(gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        return torch.zeros(())
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
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
    largest = {name: value.float().numpy() for name, value in gradients.largest.items()}
    return Outcome(losses.numpy() / ranks, np.array(gradients.norms), weights, largest)


@cache
def on_one_device(name: str) -> Outcome:
    return run_on_ranks(lambda: fit_zoo(ZOO[name], 1), 1)[0]


@cache
def in_double_precision(name: str) -> Outcome:
    return run_on_ranks(lambda: fit_zoo(ZOO[name], 1, precision="64-true"), 1)[0]


@cache
def on_ranks(name: str, strategy: str) -> tuple[Outcome, ...]:
    """The outcome of each rank under one of ``CASES``."""
    case = CASES[strategy]
    ranks = case.sizes.world
    return tuple(
        run_on_ranks(
            lambda: fit_zoo(ZOO[name], ranks, sizes=case.sizes, strategy=case.make()), ranks, deadline_seconds=180
        )
    )


on_two_ranks = on_ranks


def assert_same_outcome(
    plain: Outcome, other: Outcome, rtol: float = 1e-5, atol: float = 1e-6, exact: Outcome | None = None
) -> None:
    """Same losses, gradient norms and weights, but for weights whose gradient is zero in exact arithmetic.

    The bias of an attention's keys is one: softmax does not see it. Its computed gradient is rounding noise, and
    Adam divides noise by its own size; such elements (a few in a hundred) differ between any two orders of summation.
    With ``exact``, one device's outcome in double precision, elements that one device itself does not compute to
    half the tolerance (a gradient near zero in one of the first steps) count as such too.
    """
    assert list(other.weights) == list(plain.weights), "state_dict keys changed"
    np.testing.assert_allclose(other.losses, plain.losses, rtol=rtol, atol=atol, err_msg="losses")
    np.testing.assert_allclose(other.grad_norms, plain.grad_norms, rtol=rtol, atol=atol, err_msg="gradient norms")
    noise = 0
    for name, weight in plain.weights.items():
        is_noise = plain.largest_gradients.get(name, np.ones(())) < NOISE
        if exact is not None:
            is_noise = is_noise | ~np.isclose(weight, exact.weights[name], rtol=rtol / 2, atol=atol / 2)
        noise += int(is_noise.sum())
        ours, theirs = (np.where(is_noise, 0, values) for values in (other.weights[name], weight))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=name)
    assert noise <= 0.05 * sum(weight.size for weight in plain.weights.values())
