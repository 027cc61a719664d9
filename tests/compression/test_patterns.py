"""Patterns: what each prunes together, in every way in which weights are stored, and what it refuses."""

import pytest
import torch
from torch import nn

from lightning_memopt.compression.masks import prune_weights
from lightning_memopt.compression.patterns import Blocks, Channels, Elements, Groups, as_pattern
from lightning_memopt.compression.selection import select_weights


def _conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(16, 8)


_LAYERS = {
    "linear": lambda: nn.Linear(8, 16),
    "conv": lambda: nn.Conv2d(8, 16, 3),
    "transposed": lambda: nn.ConvTranspose2d(8, 16, 3),
    "conv1d": _conv1d,
    "lstm": lambda: nn.LSTM(8, 4),
}


def _by_outputs_and_inputs(layer: nn.Module) -> list[torch.Tensor]:
    """Each weight with its outputs first and its inputs last."""
    return [w.parameter.detach().movedim((w.output_dim, w.input_dim), (0, -1)) for w in select_weights(layer).weights]


@pytest.mark.parametrize("kind", _LAYERS)
def test_two_of_four_keeps_the_two_largest_of_four_neighbouring_inputs(kind):
    torch.manual_seed(0)
    layer = _LAYERS[kind]()
    before = [weight.clone() for weight in _by_outputs_and_inputs(layer)]
    prune_weights(layer, 0.5, pattern="2:4")
    for old, new in zip(before, _by_outputs_and_inputs(layer), strict=True):
        groups, kept = old.unflatten(-1, (-1, 4)), new.unflatten(-1, (-1, 4))
        assert ((kept != 0).sum(-1) == 2).all()
        largest = groups.abs().topk(2, dim=-1).values.sort(-1).values
        torch.testing.assert_close(kept.abs().sort(-1).values[..., 2:], largest, rtol=0, atol=0)


@pytest.mark.parametrize("kind", _LAYERS)
def test_blocks_are_pruned_whole_and_those_of_the_smallest_mean(kind):
    torch.manual_seed(0)
    layer = _LAYERS[kind]()
    before = [weight.clone() for weight in _by_outputs_and_inputs(layer)]
    prune_weights(layer, 0.75, pattern="4x2")
    for old, new in zip(before, _by_outputs_and_inputs(layer), strict=True):

        def blocks(weight):
            return weight.reshape(len(weight) // 4, 4, -1, weight.shape[-1] // 2, 2).movedim(1, -1).flatten(3)

        pruned = (blocks(new) == 0).sum(-1)
        assert set(pruned.unique().tolist()) == {0, 8}
        means = blocks(old).abs().mean(-1)
        assert means[pruned == 8].max() < means[pruned == 0].min()
        assert (pruned == 8).float().mean() == 0.75


@pytest.mark.parametrize("kind", _LAYERS)
@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_channels_are_pruned_whole_on_the_side_that_was_named(kind, side):
    torch.manual_seed(0)
    layer = _LAYERS[kind]()
    prune_weights(layer, 0.5, pattern=Channels(side, norm=1))
    for weight in _by_outputs_and_inputs(layer):
        rows = weight.flatten(1) if side == "outputs" else weight.movedim(-1, 0).flatten(1)
        assert (rows == 0).all(1).float().mean() == 0.5
        assert ((rows == 0).all(1) | (rows != 0).all(1)).all()


def test_names_of_patterns():
    assert as_pattern("elements") == Elements() == as_pattern(Elements())
    assert as_pattern("1:4") == Groups(1, 4) and as_pattern("4x1") == Blocks(4, 1)
    assert as_pattern("inputs") == Channels("inputs")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2-4", "pattern='2-4' is none of"),
        (None, "pattern=None is none of"),
        ("4:4", "4:4 keeps no share"),
        ("0x4", "A block of 0 x 4 has no element"),
        ("rows", "pattern='rows' is none of"),
    ],
)
def test_what_is_no_pattern_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        as_pattern(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "include": ["0", "1"]}, "'1.weight' has 6 inputs, which 4 does not divide.*exclude='1.w"),
        ({"pattern": "2:4", "exclude": "0"}, "'1.weight' has 6 inputs, which 4 does not divide"),
        (
            {"pattern": "4x1", "include": nn.Linear},
            "'1.weight' is 3 outputs by 6 inputs, which blocks of 4 x 1 do not",
        ),
        ({"pattern": "1:4", "exclude": "1"}, "A sparsity of 0.5 is not that of 1:4, which is 0.75"),
    ],
)
def test_a_weight_that_does_not_divide_is_refused_by_name_where_it_is_asked_for(options, message):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=message):
        prune_weights(net, 0.5, **options)
    assert (net[0].weight != 0).all()


@pytest.mark.parametrize(("pattern", "reason"), [("2:4", "has 3 inputs"), ("4x4", "is 16 outputs by 3 inputs")])
def test_what_a_pattern_does_not_divide_and_nobody_asked_for_is_left_and_named(pattern, reason):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    masks = prune_weights(net, 0.5, pattern=pattern)
    assert (net[0].weight != 0).all() and float((net[2].weight == 0).float().mean()) == 0.5
    assert masks.sparsity == 0.5 and masks.skipped["0.weight"].startswith(reason)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("pattern", "least"), [("elements", 1 / 64), ("4x4", 16 / 64), ("outputs", 8 / 64), ("inputs", 8 / 64)]
)
def test_a_share_of_which_nothing_would_be_pruned_is_refused(pattern, least, scope):
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"'0.weight' and of every other weight is less than pattern="):
        prune_weights(net, 0.4 * least, pattern=pattern, scope=scope)
    assert (net[0].weight != 0).all()
    assert prune_weights(net, least, pattern=pattern, scope=scope).sparsity == least


def test_a_layer_of_one_output_is_left_whole_where_outputs_are_pruned_and_refused_alone():
    assert prune_weights(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), 0.5, pattern="outputs").sparsity == 32 / 72
    with pytest.raises(ValueError, match="nothing would be pruned"):
        prune_weights(nn.Linear(8, 1), 0.9, pattern="outputs")
