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


def test_stages_of_different_size_give_their_inner_blocks():
    class Stage(nn.Module):
        def __init__(self, width, depth):
            super().__init__()
            self.blocks = nn.ModuleList(_block(width) for _ in range(depth))

    stages = nn.ModuleList([Stage(8, 2), Stage(16, 3)])
    assert [stack.name for stack in find_block_stacks(stages)] == ["1.blocks", "0.blocks"]


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
