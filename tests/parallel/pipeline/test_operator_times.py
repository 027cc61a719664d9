"""Stages balanced by how long operators take, where a count misjudges them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.parallel.pipeline import operator_times
from lightning_memopt.parallel.pipeline.operator_times import OperatorTimes
from lightning_memopt.parallel.pipeline.probe import find_links, run_silently, survey
from lightning_memopt.parallel.pipeline.splitting import partition
from lightning_memopt.parallel.pipeline.stubs import StubMode, shadow_of
from tests.zoo import ZOO

CPU = torch.device("cpu")
aten = torch.ops.aten


def _survey(module, step, times):
    mode = StubMode()
    tensors = (*module.parameters(), *module.buffers())
    shadow, _ = shadow_of(module, {tensor: mode.stub(tensor, CPU) for tensor in tensors})
    run = run_silently(shadow, lambda: step(shadow))
    return survey(shadow, find_links(shadow, run), mode, run, times)


class Block(nn.Module):
    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.linear, self.slow = nn.Linear(64, 64), slow

    def forward(self, x):
        return self.linear(x.digamma() if self.slow else x.neg())


class _Heard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _twenty_for_digamma(run, device):
    with _Heard() as heard:
        run()
    return 20.0 if "aten.digamma.default" in heard.names else 1.0


def test_operators_that_take_longer_than_their_count_says_get_fewer_neighbours(monkeypatch):
    monkeypatch.setattr(operator_times, "_seconds_of", _twenty_for_digamma)
    model = nn.Sequential(*[Block(slow=index == 1) for index in range(6)])
    times = OperatorTimes(CPU)
    found = _survey(model, lambda shadow: shadow(torch.ones(8, 64)).sum(), times)
    assert partition(found, "auto", 2).starts == (0, 3)
    measured = replace(found, costs=times.costs(len(found.costs)))
    assert partition(measured, "measured", 2).starts == (0, 2)


@pytest.mark.parametrize("name", ["gpt2", "cnn", "vit"])
def test_every_operator_of_a_step_runs_on_values_that_are_made_up(name):
    entry = ZOO[name]
    module, batch = entry.build(), entry.batch()
    module.log = lambda *_, **__: None
    times = OperatorTimes(CPU)
    found = _survey(module, lambda shadow: shadow.training_step(batch, 0), times)
    assert [call.function for call in times._counted if call.try_on(CPU) is None] == []
    assert all(seconds > 0 for seconds in times.costs(len(found.costs))[1:])


def test_blocks_that_are_alike_cost_the_same_to_the_last_digit():
    module = nn.Sequential(*[Block(slow=False) for _ in range(4)])
    times = OperatorTimes(CPU)
    _survey(module, lambda shadow: shadow(torch.ones(8, 64)).sum(), times)
    costs = times.costs(5)
    assert costs[2] == costs[3]


def test_what_has_no_derivative_is_timed_forwards_and_what_cannot_be_tried_is_counted():
    times = OperatorTimes(CPU)
    times.heard(0, aten.argmax.default, (torch.ones(64),), {}, counted=10.0)
    times.heard(1, aten.linalg_cholesky.default, (torch.ones(3),), {}, counted=20.0)  # no matrix
    costs = times.costs(2)
    assert costs[0] > 0 and costs[1] == pytest.approx(2 * costs[0])


def test_timing_draws_no_random_numbers_of_the_training():
    times = OperatorTimes(CPU)
    times.heard(0, aten.native_dropout.default, (torch.ones(64), 0.5, True), {}, counted=64.0)
    before = torch.get_rng_state()
    times.costs(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), ()])
def test_tensors_are_made_of_any_type_and_shape(dtype, shape):
    like = operator_times._described(torch.zeros(shape, dtype=dtype))
    assert operator_times._described(like.make(CPU)) == like


def test_a_tensor_of_which_several_elements_are_one_is_made_so():
    like = operator_times._described(torch.zeros(3, 1).expand(3, 5))
    assert operator_times._described(like.make(CPU)) == like
