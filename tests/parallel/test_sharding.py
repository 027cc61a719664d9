"""Sharding as a plain function, in a training loop without Lightning."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_memopt.parallel.gather import (
    gather_module_state,
    gather_optimizer_state,
    shard_module_state,
    shard_optimizer_state,
)
from lightning_memopt.parallel.optimizers import check_steps_shards
from lightning_memopt.parallel.sharding import Sharding, shard_module
from tests.distributed import run_on_ranks


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )


def _shard(model: nn.Module, stage: Any = "parameters", **options: Any) -> Sharding:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return shard_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), stage, **options)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for seed in range(count):
        batch = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(seed))
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _on_two(function: Callable[[], Any]) -> list[Any]:
    return run_on_ranks(function, 2, deadline_seconds=30)


def test_sharding_and_undoing_leaves_the_trained_weights_of_one_device():
    def train() -> dict[str, np.ndarray]:
        model = _model()
        sharding = _shard(model)
        _steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
        sharding.undo()
        assert type(model) is nn.TransformerEncoder
        return {name: value.numpy() for name, value in model.state_dict().items()}

    plain = _model()
    _steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    for weights in _on_two(train):
        for name, weight in plain.state_dict().items():
            np.testing.assert_allclose(weights[name], weight.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_after_undoing_the_module_is_pickled_with_no_hook_that_holds_the_shards():
    def undo() -> list[int]:
        model = _model()
        sharding = _shard(model)
        sharding.undo()
        hooks = [len(part._load_state_dict_post_hooks) for part in model.modules()]
        pickle.loads(pickle.dumps(model)).load_state_dict(model.state_dict())
        return hooks

    assert _on_two(undo) == [[0] * len(list(_model().modules()))] * 2


def test_between_steps_every_parameter_is_a_shard_in_every_stage():
    def kinds() -> list[bool]:
        found = []
        for stage in ("optimizer", "gradients", "parameters"):
            model = _model()
            _shard(model, stage)
            _steps(model, torch.optim.SGD(model.parameters(), lr=0.1), count=1)
            found.append(all(isinstance(p, DTensor) for p in model.parameters()))
        return found

    assert _on_two(kinds) == [[True] * 3] * 2


def test_only_the_last_stage_frees_a_block_between_forward_and_backward():
    def sharded_after_forward() -> dict[str, bool]:
        found = {}
        for stage in ("optimizer", "gradients", "parameters"):
            model = _model()
            _shard(model, stage)
            model(torch.randn(4, 3, 8))
            found[stage] = isinstance(model.layers[0].linear1.weight, DTensor)
        return found

    assert _on_two(sharded_after_forward)[0] == {"optimizer": False, "gradients": False, "parameters": True}


class NormInFull(nn.Module):
    """Weights in bfloat16, the norm in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x).bfloat16()).float()


class ScaleInFull(nn.Module):
    """Weights in bfloat16, a scale of the module's own in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.linear(x.bfloat16()).float()


class Spectrum(nn.Module):
    """A complex filter of the module's own beside real weights, which autocast computes with in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.linear = nn.Parameter(torch.randn(5, dtype=torch.cfloat)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(torch.fft.irfft(torch.fft.rfft(x) * self.filter))


@pytest.mark.parametrize("block", [NormInFull, ScaleInFull, Spectrum])
def test_parameters_of_two_types_are_sharded_beside_each_other(block: type[nn.Module]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(block(), block())

    def train() -> dict[str, np.ndarray]:
        model = build()
        sharding = _shard(model)
        _steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
        sharding.undo()
        return {name: value.cfloat().numpy() for name, value in model.state_dict().items()}

    plain = build()
    _steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    for name, weight in _on_two(train)[0].items():
        np.testing.assert_allclose(weight, plain.state_dict()[name].cfloat().numpy(), rtol=1e-2, err_msg=name)


def test_16_bits_leave_complex_parameters_as_they_are() -> None:
    def gather() -> tuple[torch.dtype, torch.dtype]:
        model = Spectrum()
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        sharding = _shard(model, policy=policy)
        model.unshard()
        model.linear.unshard()
        dtypes = model.filter.dtype, model.linear.weight.dtype
        sharding.undo()
        return dtypes

    assert _on_two(gather)[0] == (torch.cfloat, torch.bfloat16)


def test_an_optimizer_that_steps_complex_shards_to_other_values_is_refused() -> None:
    def refused() -> str:
        model = Spectrum()
        _shard(model)
        mesh = model.filter.device_mesh
        check_steps_shards(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), mesh)
        with pytest.raises(ValueError, match="complex") as said:
            check_steps_shards(torch.optim.AdamW(model.parameters()), mesh)
        return str(said.value)

    assert "AdamW steps sharded complex parameters of 1 dimensions to other values" in _on_two(refused)[0]


def test_undoing_without_gathering_needs_no_other_rank():
    def undo_alone() -> bool:
        model = _model()
        sharding = _shard(model)
        if dist.get_rank() == 0:
            sharding.undo(gather=False)
        return type(model) is nn.TransformerEncoder

    assert _on_two(undo_alone) == [True, False]


def test_whole_states_are_cut_and_gathered_back_unchanged_on_the_rank_that_keeps_them():
    def round_trip() -> bool:
        model = _model()
        _shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        _steps(model, optimizer)
        keep = dist.get_rank() == 0
        states = gather_module_state(model, True), gather_optimizer_state(optimizer, True)
        other = _model()
        _shard(other)
        loaded = torch.optim.AdamW(other.parameters())
        other.load_state_dict(shard_module_state(states[0], other))
        loaded.load_state_dict(shard_optimizer_state(states[1], loaded))
        assert isinstance(loaded.state[next(other.parameters())]["exp_avg"], DTensor)
        again = gather_module_state(other, keep), gather_optimizer_state(loaded, keep)
        if not keep:
            assert again[1]["state"] == {}
            return all(
                type(again[0][name]) is torch.Tensor
                and again[0][name].is_meta
                and again[0][name].shape == value.shape
                for name, value in states[0].items()
            )
        for name, value in states[0].items():
            torch.testing.assert_close(again[0][name], value, rtol=0, atol=0)
        for key, entry in states[1]["state"].items():
            torch.testing.assert_close(again[1]["state"][key], entry, rtol=0, atol=0)
        return True

    assert _on_two(round_trip) == [True, True]


def test_optimizers_are_accepted_by_what_they_do_to_shards():
    def try_each() -> dict[str, str]:
        model = _model()
        sharding = _shard(model)
        mesh = next(model.parameters()).device_mesh
        optimizers = {
            "AdamW": torch.optim.AdamW(model.parameters(), amsgrad=True),
            "SGD": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
            "RMSprop": torch.optim.RMSprop(model.parameters(), centered=True),
            "Adafactor": torch.optim.Adafactor(model.parameters()),
            "LBFGS": torch.optim.LBFGS(list(model.parameters())),
            "LocalNorm": LocalNorm(model.parameters(), {}),
        }
        said = {}
        for name, optimizer in optimizers.items():
            try:
                check_steps_shards(optimizer, mesh)
                said[name] = "accepted"
            except ValueError as error:
                said[name] = str(error)
            assert not optimizer.state
        sharding.undo()
        return said

    for said in _on_two(try_each):
        assert [name for name, words in said.items() if words == "accepted"] == ["AdamW", "SGD", "RMSprop"]
        assert "Adafactor fails on sharded parameters" in said["Adafactor"]
        assert "LBFGS fails on sharded parameters" in said["LBFGS"]
        assert "LocalNorm steps sharded parameters of 2 dimensions to other values" in said["LocalNorm"]


class LocalNorm(torch.optim.Optimizer):
    """Divides by the norm of what it sees, and sees one rank's part: wrong on shards, and silently."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                local = [t.to_local() if isinstance(t, DTensor) else t for t in (parameter, parameter.grad)]
                local[0].sub_(local[1] / local[1].norm())
