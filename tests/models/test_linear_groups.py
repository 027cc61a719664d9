"""Linear layers that can be split together are found by plans, shapes, head counts and order."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_memopt.models.heads import Heads, read_heads
from lightning_memopt.models.linear_groups import find_linear_groups
from lightning_memopt.models.linears import read_linear
from lightning_memopt.models.weight_reads import find_weight_reads
from tests.zoo import ZOO


def _groups(module):
    return {
        group.owner: ([(c.name.split(".")[-1], c.pieces) for c in group.columns], group.row.split(".")[-1])
        for group in find_linear_groups(module)
    }


def test_hugging_faces_own_plan_is_read_with_the_heads_of_its_attention():
    groups = {group.owner: group for group in find_linear_groups(ZOO["llama"].build())}
    assert len(groups) == 6
    attention = groups["model.model.layers.0.self_attn"]
    assert [column.name.split(".")[-1] for column in attention.columns] == ["q_proj", "k_proj", "v_proj"]
    assert attention.heads == Heads(queries=4, keys=2, size=8)
    assert groups["model.model.layers.0.mlp"].heads is None


def test_a_fused_projection_of_queries_keys_and_values_is_three_pieces():
    groups = _groups(ZOO["gpt2"].build())
    assert groups["model.transformer.h.0.attn"] == ([("c_attn", 3)], "c_proj")
    assert groups["model.transformer.h.0.mlp"] == ([("c_fc", 1)], "c_proj")


def test_cross_attention_joins_a_fused_projection_with_that_of_the_queries():
    groups = _groups(ZOO["captioner"].build())
    assert groups["model.decoder.transformer.h.0.crossattention"] == ([("c_attn", 2), ("q_attn", 1)], "c_proj")


def test_layers_of_two_children_are_joined_by_their_parent():
    groups = _groups(ZOO["bert_qa"].build())
    assert groups["model.bert.encoder.layer.0.attention"] == ([("query", 1), ("key", 1), ("value", 1)], "dense")
    assert groups["model.bert.encoder.layer.0"] == ([("dense", 1)], "dense")
    assert len(groups) == 6


@pytest.mark.parametrize(
    ("between", "is_pair"),
    [(nn.ReLU(), True), (nn.Dropout(), True), (nn.LayerNorm(8), False), (nn.Softmax(-1), False)],
)
def test_a_sequential_is_a_pair_only_with_element_wise_modules_between(between, is_pair):
    net = nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 2))
    groups = find_linear_groups(net)
    assert [group.names for group in groups] == ([("0", "2")] if is_pair else [])
    assert all(group.is_proven for group in groups)


def test_gated_layers_are_found_in_any_order_of_registration():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(self.w1(x) * self.w3(x))

    assert _groups(Gated()) == {"": ([("w1", 1), ("w3", 1)], "w2")}


def test_a_lightning_module_without_a_forward_joins_nothing_since_nothing_calls_it():
    class Steps(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    assert _groups(Steps()) == {}


def test_what_the_user_says_of_layers_joins_those_only():
    roles = {"0": "colwise", "2": "rowwise"}
    net = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 2))
    (group,) = find_linear_groups(net, roles)
    assert group.names == ("0", "2") and not group.is_proven
    assert find_linear_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), {"0": "whole"}) == []


def test_a_linear_with_a_forward_or_a_weight_of_its_own_is_no_plain_linear():
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    assert read_linear(Adapted(2, 2)) is None
    assert read_linear(patched) is None
    assert read_linear(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None
    assert read_linear(nn.Linear(2, 3)).out_features == 3


def test_a_linear_in_other_words_is_a_linear():
    class InOtherWords(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    class Scaled(InOtherWords):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    assert (
        read_linear(InOtherWords(2, 3)) == read_linear(InOtherWords(2, 3, bias=False)) == read_linear(nn.Linear(2, 3))
    )
    with torch.device("meta"):
        assert read_linear(InOtherWords(2, 3)) is not None
    scaled = Scaled(2, 3)
    scaled.scale = 2.0
    assert read_linear(scaled) is None
    masked = InOtherWords(2, 3)
    masked.register_buffer("mask", torch.ones(3, 2))
    assert read_linear(masked) is None


def test_what_an_attention_fuses_in_parts_of_several_sizes_is_joined_with_nothing():
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    groups = find_linear_groups(Phi3ForCausalLM(config))
    assert [group.owner for group in groups] == ["model.layers.0.mlp"]


def test_heads_are_read_under_the_names_that_models_use():
    module = nn.Module()
    module.n_head, module.n_kv_heads = 6, 2
    assert read_heads(module, width=48) == Heads(6, 2, 8)
    assert read_heads(module, width=50) is None
    assert read_heads(nn.Linear(2, 2), width=48) is None


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.embed, self.head = nn.Embedding(4, 2), nn.Embedding(4, 2), nn.Linear(2, 4)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids).to(self.head.weight.dtype) + self.positions.weight[: ids.shape[1]]
        return self.head(hidden) if isinstance(self.head.weight, torch.Tensor) else hidden


def test_weights_read_past_their_modules_call_are_found_and_looking_at_a_dtype_is_not_reading():
    assert find_weight_reads(nn.Sequential(_Reader())) == {"0.positions": "_Reader"}
    reads = find_weight_reads(ZOO["mamba"].build())
    assert {name.split(".")[-1] for name in reads} == {"x_proj", "out_proj", "conv1d", "dt_proj"}
