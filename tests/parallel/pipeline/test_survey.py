"""Where a step can be cut, found from one run without data."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_memopt.parallel.pipeline.probe import Survey, find_links, run_silently, survey
from lightning_memopt.parallel.pipeline.schedules import number_of_micro_batches
from lightning_memopt.parallel.pipeline.splitting import partition
from lightning_memopt.parallel.pipeline.stubs import StubMode, shadow_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return x + self.linear(x) + (0 if context is None else context)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(4))
        self.relu = nn.ReLU()

    def _aside(self, first: torch.Tensor) -> torch.Tensor:
        """What is added behind the blocks."""
        if self.kind == "followed":
            return first.exp() * 2
        if self.kind == "scaled":
            return first * self.scale
        if self.kind == "random":
            return torch.dropout(first, 0.5, True)
        if self.kind == "twice":
            return self.relu(self.relu(first) - 1) + self.scale
        if self.kind == "overwritten":
            doubled = first * 2
            doubled += self.scale
        return first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = hidden = self.embed(x)
        aside = self._aside(first)
        if self.kind == "changed":
            first += self.scale
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, first if self.kind == "context" else None)
            if self.kind == "reads" and index == 1 and hidden.sum() > 0:
                hidden = hidden + 1
        if self.kind not in ("plain", "context", "reads"):
            hidden = hidden + aside
        return self.head(hidden).sum()


def _survey(kind: str) -> Survey:
    model, mode = Model(kind), StubMode()
    shadow, _ = shadow_of(model, {p: mode.stub(p, torch.device("cpu")) for p in model.parameters()})
    run = run_silently(shadow, lambda: shadow(torch.ones(2, 4)))
    return survey(shadow, find_links(shadow, run), mode, run)


@pytest.mark.parametrize("kind", ["plain", "context"])
def test_every_block_is_a_place_to_cut_where_all_goes_through_arguments(kind):
    found = _survey(kind)
    assert found.names == [f"blocks.{index}" for index in range(4)]
    assert not set(found.uncut) - {0}
    assert partition(found, "auto", 2).starts == (0, 2)
    assert partition(found, ["blocks.3"], 2).starts == (0, 3)


@pytest.mark.parametrize("kind", ["skip", "followed"])
def test_what_modules_return_is_sent_where_it_or_what_follows_from_it_is_used_behind_the_blocks(kind):
    found = _survey(kind)
    assert not set(found.uncut) - {0}
    assert found.boundaries[1].carried == found.boundaries[3].carried == {("embed", 0): 1}
    assert [tuple(meta.shape) for meta in found.boundaries[3].metas] == [(2, 4), (2, 4)]


@pytest.mark.parametrize("kind", ["scaled", "random", "twice", "overwritten", "changed"])
def test_a_skip_around_the_blocks_that_cannot_be_computed_again_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"cut in 0 places: .*`blocks.\d`"):
        partition(_survey(kind), "auto", 2)


def test_a_step_that_reads_values_is_cut_only_before_it_does():
    found = _survey("reads")  # behind block 1, so the last stage has to begin there at the latest
    assert found.names == ["blocks.0", "blocks.1"]
    assert not found.is_whole


class Repeats(nn.Module):
    """Calls one block three times."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(4, 4), nn.Linear(4, 1)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *layers)

    def forward(self, x: torch.Tensor, recomputes: bool) -> torch.Tensor:
        hidden = self.inlet(x)
        for _ in range(3):
            hidden = checkpoint(self.block, hidden, use_reentrant=False) if recomputes else self.block(hidden)
        return self.outlet(hidden).sum()


def _survey_of_repeats(*layers: nn.Module, recomputes: bool = False) -> Survey:
    model, mode = Repeats(*layers), StubMode()
    shadow, _ = shadow_of(
        model, {t: mode.stub(t, torch.device("cpu")) for t in (*model.parameters(), *model.buffers())}
    )
    run = run_silently(shadow, lambda: shadow(torch.ones(2, 4), recomputes))
    return survey(shadow, find_links(shadow, run), mode, run)


def test_each_call_of_a_block_that_is_called_again_and_again_is_a_place_to_cut():
    found = _survey_of_repeats()
    assert found.names == ["inlet", "block", "block", "block", "outlet"]
    assert not set(found.uncut) - {0}
    assert partition(found, "auto", 3).starts == (0, 2, 3)


def test_a_block_that_is_called_again_is_no_place_to_cut_where_it_writes_buffers_or_is_recomputed():
    assert _survey_of_repeats(nn.BatchNorm1d(4)).names == ["inlet", "outlet"]
    assert _survey_of_repeats(recomputes=True).names == ["inlet", "outlet"]


def test_a_step_is_seen_to_its_end_where_that_is_a_ctc_loss():
    model, mode = nn.Sequential(*(Block() for _ in range(3))), StubMode()
    shadow, _ = shadow_of(model, {p: mode.stub(p, torch.device("cpu")) for p in model.parameters()})
    targets, lengths = torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 2])

    def step() -> torch.Tensor:
        scores = shadow(torch.ones(5, 2, 4)).log_softmax(-1)
        return torch.nn.functional.ctc_loss(scores, targets, torch.tensor([5, 5]), lengths)

    run = run_silently(shadow, step)
    assert survey(shadow, find_links(shadow, run), mode, run).is_whole


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="5 stages are asked for, and there are 4"):
        partition(_survey("plain"), "auto", 5)


def test_a_batch_is_cut_into_as_many_micro_batches_as_it_can_fill():
    assert number_of_micro_batches("auto", "1f1b", 2, samples=32) == 8
    assert number_of_micro_batches("auto", "1f1b", 2, samples=3) == 3
    assert number_of_micro_batches("auto", "interleaved_1f1b", 4, samples=15) == 12
    with pytest.raises(ValueError, match="microbatches=9 is more than the 8 samples"):
        number_of_micro_batches(9, "1f1b", 2, samples=8, is_first=True)
