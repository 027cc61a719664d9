"""A plan says what is split, why the rest is not, and how many bytes each rank holds."""

import pytest
import torch
from torch import nn

from lightning_memopt.demo.model import GPT
from lightning_memopt.parallel.tensor.describe import describe_plan
from lightning_memopt.parallel.tensor.plan import find_tensor_plan
from tests.zoo import ZOO


def _styles(plan):
    return {name: entry.style for name, entry in plan.entries.items()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert_qa", "t5", "vit", "captioner", "encoder", "mlp", "gan"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_of_each_split_layer(name, size):
    plan = find_tensor_plan(ZOO[name].build(), size)
    split = [entry for entry in plan.entries.values() if entry.style != "whole"]
    whole, rank = (sum(getattr(entry, key) for entry in split) for key in ("whole_bytes", "rank_bytes"))
    assert whole > 0
    assert rank <= whole * (1 / size + 0.05)


def test_an_attention_whose_heads_cannot_be_dealt_out_is_split_layer_by_layer_and_says_so():
    plan = find_tensor_plan(ZOO["llama"].build(), 4)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        entry = plan.entries[f"model.model.layers.0.self_attn.{projection}"]
        assert (entry.style, entry.group, entry.rank_bytes) == ("colwise", None, entry.whole_bytes // 4)
        assert entry.reason == "2 key and value heads cannot be dealt out to 4 ranks"
    assert "outputs gathered: 2 key and value heads cannot" in describe_plan(plan)
    assert plan.entries["model.model.layers.0.mlp.gate_proj"].style == "colwise"
    three = find_tensor_plan(ZOO["encoder"].build(), 3)
    assert three.entries["encoder.layers.0.self_attn"].reason == "4 heads cannot be dealt out to 3 ranks"
    assert "64 rows do not divide by 3" in describe_plan(three)


def test_a_weight_that_is_read_past_its_modules_call_stays_whole():
    plan = find_tensor_plan(GPT(2, 32, 4, 64), 2)
    assert plan.entries["positions"].reason == "GPT reads its weight past its call"
    mamba = find_tensor_plan(ZOO["mamba"].build(), 2)
    mixer = "model.backbone.layers.0.mixer"
    assert "MambaMixer" in mamba.entries[f"{mixer}.in_proj"].reason
    assert "MambaMixer" in mamba.entries[f"{mixer}.dt_proj"].reason


def test_tied_weights_are_split_alike_or_not_at_all():
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert _styles(find_tensor_plan(tied, 2)) == {"0": "vocab", "1": "colwise"}
    assert _styles(find_tensor_plan(tied, 2, {"1": "rowwise"})) == {"0": "whole", "1": "whole"}
    plan = find_tensor_plan(tied, 2, {"0": "whole"})
    assert plan.entries["1"].reason == "tied to `0`, which is not split like it"


def test_a_pair_that_loses_a_layer_is_split_layer_by_layer():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.norm.bias = self.fc1.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.fc2(self.fc1(x)))

    plan = find_tensor_plan(Tied(), 2)
    assert _styles(plan) == {"fc1": "whole", "fc2": "colwise", "norm": "whole"} and not plan.groups
    assert plan.entries["fc1"].reason == "tied to `norm`, which is not split like it"
    assert "`fc1`, with which it would be split" in plan.entries["fc2"].reason


def test_a_head_is_split_with_the_embedding_that_it_is_tied_to_rather_than_with_the_layer_before_it():
    class Head(nn.Module):
        """Of BERT for masked words: ``bias`` is the decoder's under another name."""

        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.dense, self.norm, self.decoder = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8)
            self.decoder.weight, self.bias = embedding.weight, self.decoder.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.norm(self.dense(x).relu()))

    embedding = nn.Embedding(8, 4)
    styles = _styles(find_tensor_plan(nn.Sequential(embedding, Head(embedding)), 2))
    assert styles["0"] == "vocab"
    assert styles["1.dense"] == styles["1.decoder"] == "colwise"


def test_an_embedding_that_does_more_than_look_up_is_split_if_it_leaves_the_looking_up_to_torch():
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids + 1) * torch.tensor(2.0, dtype=self.weight.dtype)

    class Sliced(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.weight[: ids.shape[1]]

    plan = find_tensor_plan(nn.ModuleDict({"scaled": Scaled(8, 4), "sliced": Sliced(8, 4)}), 2)
    assert _styles(plan) == {"scaled": "vocab", "sliced": "whole"}
    assert plan.entries["sliced"].reason == "Sliced does not look its rows up as nn.Embedding does"


def test_convolutions_are_split_by_channels_but_for_those_by_groups_or_with_a_computed_weight():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 5, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
    )  # fmt: skip
    plan = find_tensor_plan(net, 2)
    styles = _styles(plan)
    assert [styles[str(index)] for index in range(5)] == ["channels", "whole", "channels", "whole", "whole"]
    assert plan.entries["0"].rank_bytes == (8 * 3 * 9 + 8) * 4 // 2
    assert plan.entries["3"].reason == "5 channels do not divide by 2"
    assert _styles(find_tensor_plan(net, 2, {"0": "whole"}))["0"] == "whole"
    assert _styles(find_tensor_plan(net, 2, {"0": "colwise"}))["0"] == "channels"
    with pytest.raises(ValueError, match="`0` is to be 'rowwise' and cannot be split: a convolution is split by its"):
        find_tensor_plan(net, 2, {"0": "rowwise"})


def test_layers_that_stand_alone_are_split_if_those_of_one_shape_are_worth_it_together():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alone, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.alone(x))

    plan = find_tensor_plan(nn.Sequential(*(Block() for _ in range(200)), nn.Linear(8, 2)), 2)
    assert {plan.entries[f"{index}.alone"].style for index in range(200)} == {"colwise"}
    assert plan.entries["200"].reason == "too small to be worth the communication"


def test_the_users_word_is_kept():
    net = ZOO["mlp"].build()
    assert _styles(find_tensor_plan(net, 2, {"net.*": "whole"}))["net.0"] == "whole"
    assert _styles(find_tensor_plan(net, 2, {"net": "whole", "net.5": "rowwise"})) == {
        "net.0": "whole", "net.3": "whole", "net.5": "rowwise",
    }  # fmt: skip
    assert [group.names for group in find_tensor_plan(net, 2, {"net.0": "rowwise"}).groups] == [("net.3", "net.5")]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"nett": "whole"}, "'nett' matches no submodule with parameters; there are, for example, 'net.0'"),
        ({"net.0": "columns"}, "'columns' is no style; choose one of 'colwise', 'rowwise', 'whole'"),
    ],
)
def test_overrides_that_cannot_be_are_refused_by_name(overrides, said):
    with pytest.raises(ValueError, match=said):
        find_tensor_plan(ZOO["mlp"].build(), 2, overrides)


def test_an_override_that_does_not_divide_or_is_no_linear_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`net.5` is to be 'colwise' and cannot be split: 4 outputs do not divide"):
        find_tensor_plan(ZOO["mlp"].build(), 3, {"net.5": "colwise"})
    with pytest.raises(ValueError, match="`lstm` is to be 'rowwise' and cannot be split: LSTM"):
        find_tensor_plan(ZOO["lstm"].build(), 2, {"lstm": "rowwise"})
    with pytest.raises(ValueError, match="`embed` is to be 'colwise' and cannot be split: an embedding"):
        find_tensor_plan(ZOO["lstm"].build(), 2, {"embed": "colwise"})


def test_the_description_has_a_line_for_each_module_and_the_sums():
    text = describe_plan(find_tensor_plan(ZOO["mlp"].build(), 2))
    lines = text.splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["net.0", "colwise", "4,352", "2,176"],
        ["net.3", "rowwise", "16,640", "8,448"],
        ["net.5", "colwise", "1,040", "520"],
    ]
    assert lines[-1].split()[3:5] == ["22,032", "11,144"]
