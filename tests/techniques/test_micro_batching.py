"""Micro-batches in a plain loop, halving, and what a failed attempt leaves behind."""

import random
from contextlib import contextmanager

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lightning_memopt.techniques.counting import counter
from lightning_memopt.techniques.micro_batching import (
    WHOLE_BATCH,
    backward_in_micro_batches,
    halve_on_out_of_memory,
)
from lightning_memopt.techniques.snapshot import StepSnapshot


@pytest.mark.parametrize("size", [1, 3, 8, 9])
def test_loss_and_gradient_are_those_of_the_whole_batch(size):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    expected = model(x).square().mean()
    expected.backward()
    gradient = model.weight.grad.clone()
    model.zero_grad()
    loss = backward_in_micro_batches(lambda micro: model(micro).square().mean(), x, size)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(model.weight.grad, gradient)


def test_token_counts_weigh_micro_batches_of_uneven_length():
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    labels = torch.randint(0, 5, (4, 6))
    for row, length in enumerate((6, 1, 0, 3)):
        labels[row, length:] = -100
    batch = {"x": torch.randn(4, 6, 3), "labels": labels}

    def step(micro):
        return {
            "loss": F.cross_entropy(model(micro["x"]).flatten(0, 1), micro["labels"].flatten()),
            "rows": micro["x"],
        }

    whole = step(batch)["loss"]
    whole.backward()
    gradient = model.weight.grad.clone()
    model.zero_grad()
    output = backward_in_micro_batches(step, batch, 1, count=counter("tokens", mask_key="labels"))
    torch.testing.assert_close(output["loss"], whole.detach())
    torch.testing.assert_close(output["rows"], batch["x"])
    torch.testing.assert_close(model.weight.grad, gradient)


def test_the_context_around_knows_the_weight_and_the_last():
    seen = []

    @contextmanager
    def around(weight, is_last):
        seen.append((weight, is_last))
        yield

    weight = nn.Parameter(torch.ones(1))
    backward_in_micro_batches(lambda micro: (micro * weight).mean(), torch.ones(5, 1), 2, around=around)
    assert seen == [(0.4, False), (0.4, False), (0.2, True)]


def test_only_one_graph_lives_at_a_time():
    import weakref

    weight, graphs = nn.Parameter(torch.ones(3)), []

    def step(micro):
        assert all(ref() is None for ref in graphs)
        hidden = (micro * weight).exp()
        graphs.append(weakref.ref(hidden))
        return {"loss": hidden.mean(), "kept": hidden.sum()}

    backward_in_micro_batches(step, torch.ones(4, 3), 1)
    assert len(graphs) == 4


def test_it_runs_on_fake_tensors():
    with FakeTensorMode():
        model, labels = nn.Linear(3, 5), torch.zeros(8, dtype=torch.long)
        batch = {"x": torch.randn(8, 3), "labels": labels}
        loss = backward_in_micro_batches(
            lambda micro: F.cross_entropy(model(micro["x"]), micro["labels"]),
            batch,
            3,
            count=counter("tokens", mask_key="labels"),
        )
        assert loss.shape == ()
        assert model.weight.grad.shape == (5, 3)


def test_sizes_are_halved_until_the_attempt_goes_through():
    tried, restored = [], []

    def attempt(size):
        tried.append(size)
        if size > 3:
            raise MemoryError
        return "done"

    result = halve_on_out_of_memory(attempt, WHOLE_BATCH, 13, restore=lambda: restored.append(len(tried)))
    assert result == ("done", 2)
    assert tried == [WHOLE_BATCH, 7, 4, 2]
    assert restored == [1, 2, 3]


def test_a_device_that_went_through_repeats_the_batch_with_one_that_did_not():
    answers = iter((4, 2, 2))
    tried = []
    result = halve_on_out_of_memory(
        lambda size: tried.append(size), 8, 8, restore=lambda: None, agree=lambda size: min(size, next(answers))
    )
    assert tried == [8, 4, 2]
    assert result == (None, 2)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def attempt(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        halve_on_out_of_memory(attempt, 8, 8, restore=lambda: None)


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.own = torch.Generator().manual_seed(0)
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x):
        self.replaced = self.replaced + 1  # a new tensor under the same name
        return (
            self.norm(x) * torch.rand(1, generator=self.own) * torch.rand(1) * random.random() * numpy.random.rand()
        )


def test_a_snapshot_brings_back_random_state_buffers_and_gradients_more_than_once():
    model = Drawing()
    model(torch.randn(4, 2)).sum().backward()  # pending gradients
    before = {name: buffer.clone() for name, buffer in model.state_dict().items()}
    gradients = [(parameter.grad, parameter.grad.clone()) for parameter in model.parameters()]
    snapshot = StepSnapshot(model)
    draws = []
    for _ in range(3):
        own = torch.rand(2, generator=model.own).tolist()
        draws.append((torch.rand(2).tolist(), random.random(), numpy.random.rand(), own))
        model(torch.randn(4, 2)).sum().backward()
        snapshot.restore()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        for parameter, (gradient, value) in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is gradient
            assert parameter.grad.equal(value)
    assert draws[0] == draws[1] == draws[2]
