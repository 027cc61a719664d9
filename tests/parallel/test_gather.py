"""Whole state from ranks that hold different parts of a model, as pipeline stages do, and back."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lightning_memopt.parallel.gather import (
    complete_in_place,
    gather_module_state,
    gather_optimizer_state,
    shard_module_state,
    shard_optimizer_state,
)
from lightning_memopt.parallel.loss_scale import unscale_on_all_ranks
from tests.distributed import run_on_ranks


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4), nn.Linear(4, 6, bias=False))
    model[3].weight = model[0].weight
    return model


OWNED = {0: (0, 1, 3), 1: (2, 3)}
"""Which layers each rank holds; the tied weight is on both."""


def _keep_part(model: nn.Module) -> nn.Module:
    """Move to the meta device what this rank does not hold, as ties are kept."""
    held = {id(t) for i in OWNED[dist.get_rank()] for t in [*model[i].parameters(), *model[i].buffers()]}
    on_meta: dict[int, Any] = {}
    for submodule in model.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            if id(parameter) not in held:
                setattr(submodule, name, on_meta.setdefault(id(parameter), nn.Parameter(parameter.to("meta"))))
        for name, buffer in list(submodule.named_buffers(recurse=False)):
            if id(buffer) not in held:
                setattr(submodule, name, buffer.to("meta"))
    return model


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for index, parameter in enumerate(model.parameters()):
        if not parameter.is_meta:
            parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
    optimizer.step()


def _arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _arrays(value) for key, value in state.items()}
    if isinstance(state, torch.Tensor) and state.is_meta:
        return tuple(state.shape), state.dtype
    return state.detach().numpy().copy() if isinstance(state, torch.Tensor) else state


def _assert_same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        (_assert_same if isinstance(value, dict) else np.testing.assert_array_equal)(value, other[key])


def _gathered() -> tuple[Any, Any]:
    dist.init_process_group("gloo")
    model = _keep_part(_model())
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    keep = dist.get_rank() == 0
    return _arrays(gather_module_state(model, keep)), _arrays(gather_optimizer_state(optimizer, keep)).get("state")


def test_the_writer_gets_what_each_rank_holds_in_the_order_of_one_device():
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    (module_state, optimizer_state), (stand_ins, none) = run_on_ranks(_gathered, 2)
    _assert_same(_arrays(model.state_dict()), module_state)
    _assert_same(_arrays(optimizer.state_dict()["state"]), optimizer_state)
    assert list(stand_ins) == list(module_state)
    for name, whole in model.state_dict().items():
        if name.startswith("1."):  # which the other rank does not hold
            assert stand_ins[name] == (tuple(whole.shape), whole.dtype)
        else:
            np.testing.assert_array_equal(stand_ins[name], module_state[name])
    assert none == {}


def test_each_rank_loads_its_part_and_training_goes_on_as_on_one_device():
    def resume() -> Any:
        dist.init_process_group("gloo")
        whole = _model()
        whole_optimizer = torch.optim.AdamW(whole.parameters())
        _step(whole, whole_optimizer)
        model = _keep_part(_model())
        optimizer = torch.optim.AdamW(model.parameters())
        model.load_state_dict(shard_module_state(whole.state_dict(), model))
        optimizer.load_state_dict(shard_optimizer_state(whole_optimizer.state_dict(), optimizer))
        for stepped, with_optimizer in ((whole, whole_optimizer), (model, optimizer)):
            _step(stepped, with_optimizer)
        complete_in_place(model)
        return _arrays(whole.state_dict()), _arrays(model.state_dict()), model[0].weight is model[3].weight

    for whole, completed, is_tied in run_on_ranks(resume, 2):
        _assert_same(whole, completed)
        assert is_tied


def test_completing_leaves_a_recurrent_module_that_runs():
    def run() -> bool:
        dist.init_process_group("gloo")
        model = _keep_part(_model())
        complete_in_place(model)
        x = torch.zeros(2, 1, 4)
        return torch.equal(model[2](x)[0], _model()[2](x)[0])

    assert run_on_ranks(run, 2) == [True, True]


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    def step(overflows_on: int | None) -> tuple[float, float]:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        parameter = nn.Parameter(torch.ones(()))
        parameter.grad = torch.tensor(float("inf") if dist.get_rank() == overflows_on else 4.0)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        found = unscale_on_all_ranks(optimizer, torch.tensor(0.5), torch.zeros(()), False)
        return float(parameter.grad), float(sum(found.values()))

    assert run_on_ranks(lambda: [step(None), step(1)], 2) == [
        [(2.0, 0.0), (2.0, 1.0)],
        [(2.0, 0.0), (float("inf"), 1.0)],
    ]
