"""The block finder finds what a person would call the blocks."""

import pytest
from torch import nn

from lightning_memopt.models.blocks import find_block_stacks
from lightning_memopt.models.ties import find_tied_parameters
from tests.zoo import ZOO


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ["model.transformer.h"]),
        ("llama", ["model.model.layers"]),
        ("bert_qa", ["model.bert.encoder.layer"]),
        ("t5", ["model.decoder.block", "model.encoder.block"]),
        ("mamba", ["model.backbone.layers"]),
        ("vit", ["model.vit.layers"]),
        ("captioner", ["model.decoder.transformer.h", "model.encoder.layers"]),
        ("encoder", ["encoder.layers"]),
        ("cnn", ["blocks"]),
        ("mlp", []),
        ("lstm", []),
    ],
)
def test_the_stacks_of_the_zoo_are_found_largest_first(name, expected):
    assert [stack.name for stack in find_block_stacks(ZOO[name].build())] == expected


def _block(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, width)


class _Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


def test_stages_of_different_size_give_their_inner_blocks():
    stages = nn.ModuleList([_Stage(_block(8), _block(8)), _Stage(_block(16), _block(16), _block(16))])
    assert [stack.name for stack in find_block_stacks(stages)] == ["1.blocks", "0.blocks"]


def test_a_stage_of_one_block_gives_that_block_where_others_have_several():
    stages = nn.ModuleList([_Stage(_block(8)), _Stage(_block(16), _block(16)), _Stage(_block(32))])
    assert [stack.names for stack in find_block_stacks(stages)] == [
        ("2.blocks.0",), ("1.blocks.0", "1.blocks.1"), ("0.blocks.0",)
    ]  # fmt: skip


class _ConvLayer(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__(nn.Conv2d(channels, out, 3), nn.BatchNorm2d(out), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.shortcut = _ConvLayer(channels, out) if channels != out else nn.Identity()
        self.layer = nn.Sequential(_ConvLayer(channels, out), _ConvLayer(out, out))


def test_residual_blocks_of_layers_with_norm_and_activation_are_the_blocks_and_not_these_layers():
    stages = nn.ModuleList([_Stage(_Residual(4, 4), _Residual(4, 4)), _Stage(_Residual(4, 8), _Residual(8, 8))])
    assert [stack.name for stack in find_block_stacks(stages)] == ["1.blocks", "0.blocks"]
    assert [stack.name for stack in find_block_stacks(_Stage(_Residual(4, 8), _Residual(8, 8)))] == ["blocks"]


def test_plain_attributes_of_one_class_are_a_stack():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = _block(8), _block(8)

    (stack,) = find_block_stacks(Net())
    assert stack.names == ("first", "second")


def test_two_towers_give_the_blocks_inside_them_and_not_the_towers():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(_block(8) for _ in range(2))

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = Tower(), Tower()

    assert {stack.name for stack in find_block_stacks(Siamese())} == {"query.layers", "key.layers"}


def test_experts_inside_equal_blocks_do_not_hide_the_blocks():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(8, 8)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(3))
    assert [stack.name for stack in find_block_stacks(model)] == ["layers"]


def test_a_tied_block_is_counted_once():
    layer = _block(8)
    (stack,) = find_block_stacks(nn.ModuleList([_block(8), _block(8)]))
    assert stack.parameter_count == 2 * sum(p.numel() for p in layer.parameters())


def test_ties_are_grouped_by_tensor():
    groups = find_tied_parameters(ZOO["gpt2"].build())
    assert groups == [("model.transformer.wte.weight", "model.lm_head.weight")]
    assert find_tied_parameters(ZOO["mlp"].build()) == []
