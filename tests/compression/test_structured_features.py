"""Which features structured pruning removes together: copies, gates, groups, and those that operators move."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_memopt.compression.structured import plan_structured, prune_structured

pytest.importorskip("torch_pruning")


class Copied(nn.Module):
    """Features twice over, side by side or each beside itself, a gate between what it opens, and a tied head."""

    def __init__(self, side_by_side: bool) -> None:
        super().__init__()
        self.side_by_side = side_by_side
        self.embed, self.both = nn.Embedding(10, 8), nn.Linear(8, 24)
        self.narrow, self.reads = nn.Linear(12, 8), nn.Linear(16, 6)
        self.back, self.head = nn.Linear(6, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        opened, gate = self.both(x).unflatten(-1, (-1, 2)).unbind(-1)
        x = self.narrow(opened * gate.sigmoid()) + x
        copies = torch.cat([x[:, 0], x[:, 1:].mean(1)], -1)
        if not self.side_by_side:
            copies = x.mean(1).repeat_interleave(2, -1)
        return self.head(self.back(self.reads(copies).relu()))


@pytest.mark.parametrize("side_by_side", [True, False])
def test_copies_of_features_gates_between_others_and_tied_ends_are_cut_where_they_lie(side_by_side):
    torch.manual_seed(0)
    module, ids = Copied(side_by_side), torch.randint(0, 10, (3, 5))
    call = lambda net: net(ids)  # noqa: E731
    kept = [mask for _, mask in plan_structured(module, 0.5, call).kept]
    unread = copy.deepcopy(module)
    found = prune_structured(module, 0.5, call)
    assert {size for size, _ in found.removed.values()} == {6, 8, 12}
    width = next(mask for mask in kept if len(mask) == 8)
    with torch.no_grad():
        gone = (~width).nonzero().view(-1)
        unread.embed.weight.index_fill_(1, gone, 0)
        for layer in (unread.narrow, unread.back):
            layer.weight.index_fill_(0, gone, 0), layer.bias.index_fill_(0, gone, 0)
        for mask in kept:
            if len(mask) == 6:
                unread.back.weight.index_fill_(1, (~mask).nonzero().view(-1), 0)
            elif len(mask) == 12:
                unread.narrow.weight.index_fill_(1, (~mask).nonzero().view(-1), 0)
    torch.testing.assert_close(call(module), call(unread))
    assert module.head.weight is module.embed.weight and module.embed.weight.shape == (10, 4)


class Drifting(nn.Module):
    """What is added to each feature comes from two others: the graph goes from one to the next without end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.gates = nn.ParameterList(nn.Parameter(torch.randn(32, 64) / 10) for _ in range(4))
        self.hidden, self.last = nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x):
        x = self.first(x)
        for gate in self.gates:
            both = x @ gate
            x = x + both[..., ::2].sigmoid() * both[..., 1::2]
        return self.last(self.hidden(x).relu())


def test_features_that_are_followed_without_end_are_left_and_named_and_the_rest_is_removed():
    found = prune_structured(Drifting(), 0.5, lambda module: module(torch.ones(2, 8)))
    assert found.removed == {"hidden": (24, 12)}
    assert "cannot be followed" in found.skipped["first"]


class Pairs(nn.Module):
    """Multiplies features of rows with each other, as recommenders do, which are taken for ever more features."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, 8) for _ in range(3))
        self.first, self.last = nn.Linear(4, 8), nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        dense, keys = self.first(x).relu(), torch.zeros(len(x), dtype=torch.long)
        rows = torch.stack([dense, *(table(keys) for table in self.tables)], 1)
        return self.last(torch.cat([dense, (rows @ rows.transpose(1, 2)).flatten(1)], -1))


@pytest.mark.slow
def test_features_that_are_taken_for_ever_more_are_left_and_named_and_the_rest_is_removed():
    found = prune_structured(Pairs(), 0.5, lambda module: module(torch.ones(2, 4)))
    assert found.removed == {"last.0": (16, 8)}
    assert "cannot be followed" in found.skipped["first"]


@dataclass
class Outputs:
    classes: torch.Tensor
    boxes: tuple[torch.Tensor, ...]


class TwoHeads(nn.Module):
    """Gives out an object that holds tensors."""

    def __init__(self):
        super().__init__()
        self.trunk, self.classes, self.boxes = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x):
        features = self.trunk(x).relu()
        return {"found": Outputs(self.classes(features), (self.boxes(features),))}


def test_what_a_module_gives_out_in_a_dataclass_keeps_its_shape_and_what_it_is_made_of_is_removed():
    module = TwoHeads()
    assert prune_structured(module, 0.5, lambda module: module(torch.ones(2, 8))).removed == {"trunk": (16, 8)}
    assert module(torch.ones(2, 8))["found"].boxes[0].shape == (2, 4)


class Joined(nn.Module):
    """A hundred layers side by side: many neighbours, and no walk without end."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 4) for _ in range(100))
        self.last = nn.Linear(400, 4)

    def forward(self, x):
        return self.last(torch.cat([part(x).relu() for part in self.parts], -1))


def test_features_that_are_joined_with_those_of_many_layers_are_removed():
    found = prune_structured(Joined(), 0.5, lambda module: module(torch.ones(2, 8)))
    assert found.removed == {f"parts.{place}": (4, 2) for place in range(100)}


class Moving(nn.Module):
    """Adds to its features what layers make of them, each time in other places than theirs."""

    def __init__(self, move):
        super().__init__()
        self.move, self.first = move, nn.Linear(8, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)) for _ in range(2))
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + self.move(block(x).relu())
        return self.last(x)


MOVES = {
    "shuffled": lambda x: x.view(-1, 2, 16).transpose(1, 2).reshape(-1, 32),
    "interleaved": lambda x: torch.stack([x[:, ::2], x[:, 1::2]], 2).flatten(1),
    "swapped": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "taken": lambda x: x[:, torch.arange(31, -1, -1)],
}
"""Where the graph takes features to stay in their places, or fails."""


@pytest.mark.parametrize("move", MOVES)
def test_features_that_an_operator_moves_are_left_and_named_and_those_between_removed(move):
    torch.manual_seed(0)
    module, x = Moving(MOVES[move]), torch.randn(4, 8)
    found = prune_structured(module, 0.5, lambda module: module(x))
    assert found.removed == {f"blocks.{place}.0": (16, 8) for place in range(2)}
    assert any("compute something else" in why or "cannot be followed" in why for why in found.skipped.values())
    assert module.first.out_features == 32


class Noisy(Moving):
    """Adds noise to what it reads and to its features, and drops some, as in training."""

    def forward(self, x):
        x = F.dropout(self.first(x + torch.randn_like(x)), 0.5)
        for block in self.blocks:
            x = x + self.move(block(x).relu())
        return self.last(x + torch.randn_like(x))


def test_features_that_an_operator_moves_at_any_width_are_left_where_numbers_are_drawn_too():
    module = Noisy(lambda x: x.view(-1, 2, x.shape[-1] // 2).transpose(1, 2).flatten(1))
    found = prune_structured(module, 0.5, lambda module: module(torch.ones(4, 8)))
    assert found.removed == {f"blocks.{place}.0": (16, 8) for place in range(2)}
    assert module.first.out_features == 32


def test_features_to_which_numbers_are_added_that_are_drawn_are_removed():
    module = Noisy(nn.Identity())
    assert prune_structured(module, 0.5, lambda module: module(torch.ones(4, 8))).removed["blocks.1.2"] == (32, 16)


class OneGate(nn.Module):
    """Opens or closes all features by one number, which a layer makes of them."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(8, 32), nn.Linear(32, 1), nn.Linear(32, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.gate(x).sigmoid() * x)


def test_features_that_one_number_opens_are_removed_from_what_makes_it_too():
    module = OneGate()
    assert prune_structured(module, 0.5, lambda m: m(torch.ones(2, 8))).removed == {"first": (32, 16)}
    assert module.gate.weight.shape == (1, 16)


class Grouped(nn.Module):
    """An attention of grouped queries in one layer, each group's queries beside its key and value, within another."""

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = queries, keys, 4
        self.made = nn.Linear(16, (queries + 2 * keys) * 4)
        self.out = nn.Linear(queries * 4, 16)

    def forward(self, x):
        made = self.made(x).view(*x.shape[:2], self.num_kv_heads, -1, self.head_dim)
        each = self.num_heads // self.num_kv_heads
        queries = made[..., :-2, :].flatten(2, 3).transpose(1, 2)
        keys, values = (made[..., i, :].repeat_interleave(each, 2).transpose(1, 2) for i in (-2, -1))
        return self.out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("queries", "keys", "left"), [(8, 4, (4, 2)), (8, 1, (8, 4)), (4, 4, (4, 2))])
def test_heads_of_a_fused_layer_go_in_groups_and_the_one_key_of_all_stays(queries, keys, left):
    torch.manual_seed(0)
    module, x = (
        nn.Sequential(nn.Linear(6, 16), nn.Sequential(Grouped(queries, keys)), nn.Linear(16, 2)),
        torch.randn(2, 5, 6),
    )
    call = lambda net: net(x)  # noqa: E731
    unread = copy.deepcopy(module)
    ((_, kept),) = plan_structured(module, 0.5, call, include="1.0", exclude="1.0.out").kept
    assert prune_structured(module, 0.5, call, include="1.0", exclude="1.0.out").removed == {"1.0": left}
    with torch.no_grad():
        gone = (~kept).repeat_interleave(queries * 4 // len(kept)).nonzero().view(-1)
        unread[1][0].out.weight.index_fill_(1, gone, 0)
    torch.testing.assert_close(call(module), call(unread))
    assert module[1][0].made.out_features == (queries // 2 + 2 * max(1, keys // 2)) * 4


class Strided(nn.Module):
    """An attention in whose one layer the features of a head lie apart."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.made, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        queries, keys, values = self.made(x).view(*x.shape[:2], -1, self.num_heads, 3).transpose(1, 3).unbind(-1)
        queries, keys, values = (each.transpose(2, 3) for each in (queries, keys, values))
        return self.out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


def test_heads_that_lie_in_a_layer_as_in_none_that_is_known_are_left_and_named():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(6, 16), Strided(), nn.Linear(16, 8), nn.Linear(8, 2)), torch.randn(2, 5, 6)
    found = prune_structured(module, 0.5, lambda net: net(x))
    assert module[1].made.out_features == 48 and "cannot be told" in found.skipped["1"]
    assert found.removed["2"] == (8, 4)


class Interleaved(nn.Module):
    """Experts stored inputs by outputs, each gate beside what it opens, with biases; all of them are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.is_concatenated = 2, True, False
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 8, 64)), nn.Parameter(torch.randn(2, 32, 8))
        self.gate_up_proj_bias, self.down_proj_bias = (
            nn.Parameter(torch.randn(2, 64)),
            nn.Parameter(torch.randn(2, 8)),
        )

    def forward(self, x):
        made = (x @ self.gate_up_proj + self.gate_up_proj_bias[:, None]).unflatten(-1, (-1, 2))
        inner = made[..., 0].sigmoid() * made[..., 1]
        return (inner @ self.down_proj + self.down_proj_bias[:, None]).sum(0)


def test_features_of_experts_are_cut_with_their_gates_and_biases_by_multiples_of_eight():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 8), Interleaved(), nn.Linear(8, 2)), torch.randn(3, 4)
    unread = copy.deepcopy(module)
    ((_, kept),) = plan_structured(module, 0.3, lambda net: net(x), include="1").kept
    assert prune_structured(module, 0.3, lambda net: net(x), include="1").removed == {"1": (32, 24)}
    with torch.no_grad():
        unread[1].down_proj.index_fill_(1, (~kept).nonzero().view(-1), 0)
    torch.testing.assert_close(module(x), unread(x))
    assert module[1].gate_up_proj.shape == (2, 8, 48) and module[1].gate_up_proj_bias.shape == (2, 48)
