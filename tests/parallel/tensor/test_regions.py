"""What lies between split layers is computed in parts only where that was verified; numbers are right in any case."""

import gc
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_memopt.demo.model import Attention as DemoAttention
from lightning_memopt.parallel.pipeline.chain import Chain
from lightning_memopt.parallel.shards import whole_of_shards
from lightning_memopt.parallel.tensor.apply import tensor_parallelize
from lightning_memopt.parallel.tensor.plan import find_tensor_plan
from tests.distributed import run_on_ranks

WIDTH, HEADS, LENGTH = 16, 4, 5


class _Pair(nn.Module):
    """``between`` is what happens between the layers."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module = torch.relu) -> None:
        super().__init__()
        self.fc1, self.fc2, self.between = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


class _Attention(nn.Module):
    """Four projections, heads by an attribute; ``norm`` is over a head's features."""

    def __init__(self, norm: bool = False, returns_weights: bool = False, takes_width: bool = False) -> None:
        super().__init__()
        self.num_heads, self.embed_dim, self.returns_weights = HEADS, WIDTH, returns_weights
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH // HEADS) if norm else nn.Identity()
        self.takes_width = takes_width

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        batch, length, width = x.shape if self.takes_width else (*x.shape[:2], self.embed_dim)
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(self.norm(q) @ self.norm(k).transpose(-2, -1), -1)
        output = self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return (output, weights) if self.returns_weights else output


class _CrossedHeads(_Attention):
    def forward(self, x: Tensor) -> Tensor:
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-2, -1), -1) @ v.flip(1)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Alibi(_Attention):
    """As MPT and BLOOM have it, which take what they add to the scores as ``(heads, 1, length)``."""

    def forward(self, x: Tensor, slopes: Tensor | None = None) -> Tensor:
        heads = (*x.shape[:2], self.num_heads, WIDTH // HEADS)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1)
        if slopes is not None:
            scores = scores + slopes
        return self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))


class _WithAlibi(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Alibi()

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.arange(HEADS * x.shape[1]).view(HEADS, 1, x.shape[1]).to(x.dtype)
        return self.attention(x, slopes)


class _Positions(nn.Module):
    """A learned number for each head and pair of positions, as Swin has it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(LENGTH * LENGTH, HEADS))

    def forward(self) -> Tensor:
        return self.table.view(LENGTH, LENGTH, HEADS).permute(2, 0, 1).unsqueeze(0)


class _WithPositions(_Alibi):
    def __init__(self) -> None:
        super().__init__()
        self.positions = _Positions()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.positions())


class _Residual(_Pair):
    """As Falcon does it, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y += x
        return y


class _Gate(_Pair):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)) * self.scale)


class _GateTwice(_Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


# Of each module, whether parts are enough, and what is said if not.
CASES: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "element_wise": (_Pair, True, ""),
    "layer_norm": (lambda: _Pair(nn.LayerNorm(32)), False, "trying failed with RuntimeError"),
    "softmax": (lambda: _Pair(lambda x: torch.softmax(x, -1)), False, "features are mixed"),
    "scaled_by_width": (lambda: _Pair(lambda x: x / x.shape[-1] ** 0.5), False, "features are mixed"),
    "dropout": (lambda: _Pair(lambda x: F.dropout(x, 0.0)), True, ""),
    "batch_norm": (lambda: _Pair(lambda x: x - x.mean(0)), True, ""),
    "scale": (_Gate, True, ""),
    "scale_twice": (_GateTwice, False, "parameter is used between its layers and elsewhere"),
    "attention": (_Attention, True, ""),
    "attention_norm": (lambda: _Attention(norm=True), True, ""),
    "attention_weights": (lambda: _Attention(returns_weights=True), True, ""),
    "attention_width": (lambda: _Attention(takes_width=True), True, ""),
    "attention_fused": (lambda: DemoAttention(WIDTH, HEADS), True, ""),
    "alibi": (_WithAlibi, True, ""),
    "positions": (_WithPositions, True, ""),
    "in_place": (_Residual, True, ""),
    "convolutions": (lambda: _Convolutions(), True, ""),
    "crossed_heads": (lambda: _CrossedHeads(), False, "features are mixed"),
    "multihead": (lambda: _Multihead(), True, ""),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True), True, ""),
}


class _Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        causal = torch.ones(x.shape[0], x.shape[0]).triu(1).bool()
        padding = torch.zeros(x.shape[1], x.shape[0], dtype=torch.bool)
        padding[0, -1] = True
        mixed, weights = self.attention(x, x, x.flip(0), key_padding_mask=padding, attn_mask=causal)
        alone, _ = self.attention(x[:, 0], x[:, 0], x[:, 0], need_weights=False, attn_mask=causal, is_causal=True)
        per_head = causal.expand(x.shape[1] * HEADS, *causal.shape)
        return mixed, weights, alone, self.attention(x, x, x, attn_mask=per_head, average_attn_weights=False)[1]


class _Convolutions(nn.Module):
    """One by groups, which is whole, one that goes back, and one without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(LENGTH, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(8, 8, 3, groups=8)
        self.back = nn.ConvTranspose1d(8, 6, 3, stride=2, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.grouped(self.first(x).relu())
        return [self.back(hidden), self.back(hidden, output_size=[30]), self.first(x[0])]


def _run(module: nn.Module, x: Tensor, recompute: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients (of the inputs too)."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    outputs = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()} | {"": x.grad}
    whole = {name: whole_of_shards(grad) if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return [out.detach() for out in outputs], whole


def _compare(name: str, recompute: bool) -> tuple[list[bool], list[str]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    torch.manual_seed(0)
    module, x = CASES[name][0](), torch.randn(3, LENGTH, WIDTH)
    outputs, gradients = _run(module, x)
    kind, names = type(module), [key for key, _ in module.named_parameters()]
    split = tensor_parallelize(module, mesh, find_tensor_plan(module, mesh.size()))
    for _ in range(2):  # the first verifies
        ours, theirs = _run(module, x, recompute)
        for out, expected in zip(ours, outputs, strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        for key, gradient in gradients.items():
            torch.testing.assert_close(theirs[key], gradient, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    found = [region.is_local for region in split.regions], [region.reason for region in split.regions]
    with torch.no_grad():
        module.eval()(x)
    split.undo()
    assert type(module) is kind and [key for key, _ in module.named_parameters()] == names
    assert not any(isinstance(p, DTensor) for p in module.parameters())
    assert not any("_tensor" in key or key == "forward" for sub in module.modules() for key in vars(sub))
    return found


@pytest.fixture(scope="module")
def found():
    """Of each case, what was found on two ranks; numbers are compared on the way."""

    def compare_each():
        dist.init_process_group("gloo")
        return {name: _compare(name, recompute=False) for name in CASES}

    return run_on_ranks(compare_each, 2, deadline_seconds=60)[0]


@pytest.mark.parametrize("name", CASES)
def test_parts_are_handed_over_where_that_gives_the_same_and_gathered_with_a_reason_elsewhere(found, name):
    _, is_local, reason = CASES[name]
    locals_, reasons = found[name]
    assert all(local is is_local for local in locals_)
    assert all(reason in said if reason else not said for said in reasons)
    assert locals_ or name in ("multihead", "convolutions")


def test_layers_around_what_a_pipeline_is_cut_before_hand_over_whole_values():
    def compare() -> list[str]:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        torch.manual_seed(0)
        module, x = _Pair(nn.ReLU()), torch.randn(3, LENGTH, WIDTH)
        expected = module(x)
        chain = Chain([module.between])
        split = tensor_parallelize(module, mesh, find_tensor_plan(module, 2))
        torch.testing.assert_close(module(x), expected)
        chain.remove()
        return [region.reason for region in split.regions]

    for reasons in run_on_ranks(compare, 2):
        assert reasons == ["a pipeline is cut within the module that holds its layers"]


def test_hidden_states_of_one_token_are_not_taken_for_rows_of_heads():
    def compare() -> list[bool]:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        torch.manual_seed(0)
        module, x, slopes = _Alibi(), torch.randn(HEADS, 1, WIDTH), torch.randn(HEADS, 1, 1)
        expected = module(x, slopes)
        split = tensor_parallelize(module, mesh, find_tensor_plan(module, 2))
        for _ in range(2):
            torch.testing.assert_close(module(x, slopes), expected)
        longer = torch.randn(HEADS, WIDTH, WIDTH), torch.randn(HEADS, 1, WIDTH)  # as many tokens as features
        given = module(*longer)
        found = [region.is_local for region in split.regions]
        split.undo()
        torch.testing.assert_close(given, module(*longer))
        return found

    assert run_on_ranks(compare, 2) == [[True]] * 2


def test_trying_leaves_no_trace_in_a_checkpoint_that_surrounds_it():
    def compare_each():
        dist.init_process_group("gloo")
        return {name: _compare(name, recompute=True)[0] for name in ("attention_norm", "layer_norm", "element_wise")}

    assert run_on_ranks(compare_each, 2)[1] == {
        "attention_norm": [True],
        "layer_norm": [False],
        "element_wise": [True],
    }


def test_what_was_tried_is_not_kept():
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    def fewest(moments: int, at_most: int = 0) -> int:
        """Threads of gloo hold what they sent for a moment: seen at several moments, until there are ``at_most``."""
        counts = [tensors()]
        while counts[-1] > at_most and len(counts) < moments:
            time.sleep(0.02)
            counts.append(tensors())
        return min(counts)

    def tensors_more(name: str) -> int:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
        module, x = CASES[name][0](), torch.randn(3, LENGTH, WIDTH)
        tensor_parallelize(module, mesh, find_tensor_plan(module, mesh.size()))
        before = fewest(8)
        _run(module, x)
        module.zero_grad()
        return fewest(250, before) - before

    def count_each() -> dict[str, int]:
        gc.freeze()  # what was there before the test is not looked through each time
        dist.init_process_group("gloo")
        return {name: tensors_more(name) for name in CASES}

    more = run_on_ranks(count_each, 2, deadline_seconds=300)[0]
    assert not any(more.values()), more


@pytest.mark.slow
def test_mixtrals_experts_are_split_as_its_own_plan_says():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_local_experts=4, use_cache=False,
    )  # fmt: skip

    def compare():
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        torch.manual_seed(0)
        model, ids = MixtralForCausalLM(config), torch.randint(0, 64, (2, 16))
        expected = model(input_ids=ids, labels=ids).loss
        expected.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        plan = find_tensor_plan(model, 2)
        split = tensor_parallelize(model, mesh, plan)
        for _ in range(2):
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.testing.assert_close(loss, expected)
            for name, parameter in model.named_parameters():
                whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                torch.testing.assert_close(whole, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
        split.undo()
        return plan.entries["model.layers.0.mlp.experts"].style, [region.reason for region in split.regions]

    assert run_on_ranks(compare, 2) == [("experts", ["", ""])] * 2


class _CountReductions(TorchDispatchMode):
    reductions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reductions += "all_reduce" in str(function)
        return function(*args, **(kwargs or {}))


def test_the_sum_of_a_shared_input_is_made_once_for_all_columns():
    def count() -> int:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        module = _Attention()
        tensor_parallelize(module, mesh, find_tensor_plan(module, 2))
        x = torch.randn(3, LENGTH, WIDTH, requires_grad=True)
        module(x)
        with _CountReductions() as counted:
            module(x).sum().backward()
        return counted.reductions

    assert run_on_ranks(count, 2) == [2, 2]  # g forward, f backward
