"""What training takes beside what its operators do: calling them, checkpointing around them, Lightning's loop."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_memopt.planning.operator_rates import clock, quickest
from lightning_memopt.planning.operators import OperatorLog
from lightning_memopt.planning.quiet import quiet_lightning
from lightning_memopt.techniques.checkpointing import checkpoint_activations

_WIDTH, _BLOCKS = 8, 4
_MICRO_BATCHES, _STEPS = 16, 4


class Overheads(NamedTuple):
    """Seconds on the host.

    Attributes:
        operator: A call of an operator, with the views and the Python around it.
        recomputed: A call that is computed again, by policy of checkpointing, with what that takes around it.
        micro_batch: A micro-batch, beside its operators.
    """

    operator: float
    recomputed: dict[str, float]
    micro_batch: float


class _Block(nn.Module):
    """A block of a language model in which nothing but calls takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(_WIDTH), nn.Dropout(0.1)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(functional.gelu(self.up(x))))


class _Scale(pl.LightningModule):
    """Next to nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.scale * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _Clock(pl.Callback):
    def __init__(self, device: torch.device) -> None:
        self._device, self._begin, self.quickest = device, 0.0, float("inf")

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin = clock(self._device)

    def on_train_batch_end(self, *_: Any) -> None:
        self.quickest = min(self.quickest, clock(self._device) - self._begin)


def measure_overheads(device: torch.device) -> Overheads:
    """Measure training steps so small that nothing but overheads is in them.

    Args:
        device: What trains.
    """
    model = nn.Sequential(*(_Block() for _ in range(_BLOCKS))).to(device)
    x = torch.ones(2, 4, _WIDTH, device=device)

    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    plain, calls = quickest(step, device), _calls_by_part(step)
    per_call = plain / sum(calls.values())
    recomputed = {}
    for policy in ("full", "selective"):
        with checkpoint_activations(model, policy, modules=_Block):
            extra, again = quickest(step, device) - plain, _calls_by_part(step)["recompute"]
        recomputed[policy] = max(extra / again, per_call)
    return Overheads(per_call, recomputed, _of_micro_batch(device))


def _calls_by_part(step: Any) -> dict[str, float]:
    calls = {"forward": 0.0, "backward": 0.0, "recompute": 0.0, "optimizer": 0.0}
    with OperatorLog() as log:
        log.start()
        step()
    for call in log.calls:
        calls[call.part] += call.times
    return calls


def _of_micro_batch(device: torch.device) -> float:
    """What a step takes longer that has more of them, operators and all: next to nothing but calls of those."""
    import lightning_memopt as memopt

    def seconds(micro_batches: int) -> float:
        watch = _Clock(device)
        trainer = pl.Trainer(
            max_steps=_STEPS, accelerator=device.type, devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[memopt.MicroBatching(1), watch],
        )  # fmt: skip
        trainer.fit(_Scale(), _Repeated(torch.ones(micro_batches, 1)))
        return watch.quickest

    with quiet_lightning():
        return max(seconds(_MICRO_BATCHES) - seconds(1), 0.0) / (_MICRO_BATCHES - 1)


class _Repeated:
    """A loader of one batch."""

    def __init__(self, batch: Tensor) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(self._batch, _STEPS)

    def __len__(self) -> int:
        return _STEPS
