import pytest
import torch
from torch import nn

from lightning_memopt.techniques.checkpointing.selection import select_regions
from tests.zoo import ZOO
from tests.zoo.architectures import ARCHITECTURES


def _names(module: nn.Module, modules=None) -> list[str]:
    return [region.name for region in select_regions(module, modules)]


def test_the_blocks_of_every_stack_are_found() -> None:
    names = _names(ZOO["t5"].build())
    assert names == [f"model.{side}.block.{i}" for side in ("decoder", "encoder") for i in range(2)]


def test_a_block_that_is_alone_in_a_list_is_found_where_there_are_no_stacks() -> None:
    assert _names(ARCHITECTURES["albert"].build()) == ["model.albert.encoder.albert_layer_groups.0"]
    lone = nn.ModuleList([nn.TransformerEncoderLayer(8, 2)])
    assert _names(nn.ModuleDict({"list": lone, "head": nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))})) == [
        "list.0"
    ]


def test_a_plain_sequential_is_cut_into_about_sqrt_n_segments() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    assert _names(net) == ["[0:3]", "[3:6]", "[6:9]"]


def test_no_segment_begins_with_a_layer_that_would_overwrite_its_checkpointed_input() -> None:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)]
    assert _names(nn.Sequential(*layers)) == ["[0:4]"]


def test_a_sequential_with_a_forward_of_its_own_is_left_alone() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    with pytest.raises(ValueError, match="Residual has no repeated blocks"):
        select_regions(Residual(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def test_a_recurrent_layer_is_the_last_resort() -> None:
    assert _names(ZOO["lstm"].build()) == ["lstm"]


def test_modules_are_chosen_by_class_and_by_pattern_and_of_nested_ones_the_outermost() -> None:
    encoder = ZOO["encoder"].build()
    assert _names(encoder, nn.TransformerEncoderLayer) == [f"encoder.layers.{i}" for i in range(3)]
    assert _names(encoder, ["encoder.layers.[01]", nn.MultiheadAttention]) == [
        "encoder.layers.0", "encoder.layers.1", "encoder.layers.2.self_attn",
    ]  # fmt: skip
