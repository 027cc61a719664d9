"""What steps keep and return is on every rank of a pipeline, as on one device."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.strategies.users import MAKE, Net, losses_of, small_loader, trainer_with


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
        trainer = trainer_with(strategy, devices=ranks, num_sanity_val_steps=0)
        trainer.fit(module := KeepsOutputs(), small_loader(3), DataLoader(small_loader(3).dataset, batch_size=9))
        trainer.validate(module, small_loader(2), verbose=False)
        return module.computed

    plain = run_on_ranks(lambda: fit(1, "auto"), 1)[0]
    assert len(plain) == 3
    for computed in run_on_ranks(lambda: fit(2, memopt.PipelineParallelStrategy(schedule)), 2, deadline_seconds=30):
        for ours, theirs in zip(computed, plain, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


class MakesLists(Net):
    """Makes a list in its first step, and another one in each."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not hasattr(self, "losses"):
            self.losses = []
        self.losses.append(loss.detach())
        self.pair = [1, 2]
        return loss


def test_lists_that_steps_make_are_on_every_rank_and_hold_one_item_a_batch() -> None:
    def fit(ranks: int, strategy: Any) -> list[float]:
        trainer_with(strategy, devices=ranks).fit(module := MakesLists(), small_loader(3))
        assert getattr(module, "pair", [1, 2]) == [1, 2]
        return [float(loss) for loss in module.losses]

    plain = run_on_ranks(lambda: fit(1, "auto"), 1)[0]
    for losses in run_on_ranks(lambda: fit(2, memopt.PipelineParallelStrategy()), 2, deadline_seconds=30):
        assert losses == pytest.approx(plain, rel=1e-4)


class SeesOutputs(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.net[0](batch[0])
        return {"loss": F.cross_entropy(self.net[1:](hidden), batch[1]), "hidden": hidden.exp()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen = outputs["hidden"]


def test_what_a_step_returns_of_an_earlier_stage_is_on_every_rank_of_a_pipeline() -> None:
    def fit(*strategy: Any) -> np.ndarray:
        losses_of(module := SeesOutputs(), *strategy)
        return module.seen.detach().numpy()

    plain = run_on_ranks(fit, 1)[0]
    for seen in run_on_ranks(lambda: fit(2, MAKE["pp"]()), 2):
        np.testing.assert_allclose(seen, plain, rtol=1e-5)
