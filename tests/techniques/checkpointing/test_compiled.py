"""Checkpoints under the compiler and on fake tensors: the same training, and the peak that is predicted."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_memopt.memory.track import track_memory
from lightning_memopt.techniques.checkpointing import checkpoint_activations
from tests.techniques.checkpointing.policies import POLICIES
from tests.zoo import ZOO


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param("gpt2", "selective", marks=pytest.mark.slow),
        ("encoder", "full"),
        ("cnn", "full"),
        ("cnn", "budget"),
        ("mlp", "full"),
    ],
)
def test_a_compiled_submodule_compiles_and_trains_the_same(name: str, policy: str) -> None:
    def gradients(compiled: bool) -> list[torch.Tensor]:
        module, batch = ZOO[name].build(), ZOO[name].batch()
        module.log = lambda *args, **options: None
        part = {"gpt2": "model", "encoder": "encoder", "cnn": "blocks", "mlp": "net"}[name]
        if compiled:
            setattr(module, part, torch.compile(getattr(module, part), backend="aot_eager"))
            with checkpoint_activations(module, **POLICIES[policy]):
                module.training_step(batch, 0).backward()
        else:
            module.training_step(batch, 0).backward()
        return [p.grad for p in module.parameters()] + [b.float() for b in module.buffers()]

    torch.testing.assert_close(gradients(compiled=True), gradients(compiled=False))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile's own backend needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["gpt2", "encoder", "mlp"])
def test_with_torchs_own_compiler_checkpoints_save_less_and_train_the_same(name: str) -> None:
    def saved_and_gradients(policy: str | None, compiled: bool) -> tuple[int, list[torch.Tensor]]:
        torch._dynamo.reset()
        module, batch = ZOO[name].build(), ZOO[name].batch()
        module.log = lambda *args, **options: None
        part = {"gpt2": "model", "encoder": "encoder", "mlp": "net"}[name]
        if compiled:
            getattr(module, part).compile()
        held: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with nullcontext() if policy is None else checkpoint_activations(module, **POLICIES[policy]):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = module.training_step(batch, 0)
            loss.backward()
        return sum(held.values()), [p.grad for p in module.parameters()]

    _, expected = saved_and_gradients(None, compiled=False)
    plain_bytes, plain = saved_and_gradients(None, compiled=True)
    saved_bytes, gradients = saved_and_gradients("full", compiled=True)
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(gradients, expected)
    assert saved_bytes < 0.8 * plain_bytes


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("name", ["encoder", "cnn"])
def test_the_peak_on_fake_tensors_is_that_of_the_real_step(name: str, policy: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    def peak(fake: bool) -> int:
        module, batch = ZOO[name].build(), ZOO[name].batch()
        module.log = lambda *args, **options: None
        mode = FakeTensorMode()
        if fake:
            for part in module.modules():
                for key, p in part._parameters.items():
                    part._parameters[key] = None if p is None else nn.Parameter(mode.from_tensor(p.data))
                for key, b in part._buffers.items():
                    part._buffers[key] = None if b is None else mode.from_tensor(b)
            batch = tree_map_only(torch.Tensor, mode.from_tensor, batch)
            mode.__enter__()
        try:
            with checkpoint_activations(module, policy), track_memory(module) as tracker:
                module.training_step(batch, 0).backward()
            return tracker.report().by_category["activations"]
        finally:
            if fake:
                mode.__exit__(None, None, None)

    assert peak(fake=True) == pytest.approx(peak(fake=False), rel=0.02)
