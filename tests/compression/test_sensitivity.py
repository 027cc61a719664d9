"""Layers that can bear little are found, and the mixed recipe spares them."""

import pytest
import torch
from torch import nn

from lightning_memopt.compression.recipe import Recipe
from lightning_memopt.compression.sensitivity import scan_sensitivity


def _net():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    net.tender = net[1].weight.detach().clone()
    return net


def _judge(net):
    """Any rounding of the middle layer costs, four bits more than eight; the others may be anything."""
    error = (net[1].weight @ torch.eye(64) - net.tender).abs().mean() / net.tender.abs().mean()
    return 1.0 - error.item()


def test_each_weight_is_tried_in_each_scheme_with_the_others_as_they_were():
    found = scan_sensitivity(_net(), _judge)
    drops = {(trial.weight, trial.scheme): trial.drop for trial in found.trials}
    assert found.score == 1.0 and len(drops) == 9
    assert drops["0.weight", "nf4"] == drops["2.weight", "int8"] == 0
    assert 0 < drops["1.weight", "int8"] < drops["1.weight", "nf4"]
    sizes = {(trial.weight, trial.scheme): trial.bytes for trial in found.trials}
    assert sizes["0.weight", None] == 64 * 64 * 4 > sizes["0.weight", "int8"] > sizes["0.weight", "nf4"] > 64 * 32


def test_the_mixed_recipe_takes_the_fewest_bytes_within_bounds():
    net = _net()
    found = scan_sensitivity(net, _judge)
    drops = {(trial.weight, trial.scheme): trial.drop for trial in found.trials}
    eight, four = drops["1.weight", "int8"], drops["1.weight", "nf4"]

    def scheme_of(bound):
        recipe = found.mixed(bound, _judge, net)
        return {name: step["scheme"] for step in recipe.quantize for name in step["include"]}

    assert scheme_of(four * 1.1) == {"0.weight": "nf4", "1.weight": "nf4", "2.weight": "nf4"}
    assert scheme_of((eight + four) / 2) == {"0.weight": "nf4", "1.weight": "int8", "2.weight": "nf4"}
    assert scheme_of(eight / 2) == {"0.weight": "nf4", "2.weight": "nf4"}


def test_the_sum_is_measured_and_upgraded_where_drops_do_not_add_up():
    net = _net()

    def judge(module):
        """Harmless one by one, ruinous together."""
        packed = sum(type(layer.weight).__name__ != "Parameter" for layer in module)
        return 1.0 if packed < 2 else 0.0

    recipe = scan_sensitivity(net, judge, ["int8"]).mixed(0.1, judge, net)
    assert [len(step["include"]) for step in recipe.quantize] == [1]


def test_where_less_is_better_the_recipe_is_judged_as_the_scan_was():
    net = _net()

    def loss(module):
        """Harmless one by one, ruinous together."""
        packed = sum(type(layer.weight).__name__ != "Parameter" for layer in module)
        return 0.0 if packed < 2 else 1.0

    found = scan_sensitivity(net, loss, ["int8"], mode="min")
    assert [len(step["include"]) for step in found.mixed(0.1, loss, net).quantize] == [1]
    assert found.mixed(0.1, loss, net, mode="min") == found.mixed(0.1, loss, net)
    with pytest.raises(ValueError, match="mode='max' is not that of the scan"):
        found.mixed(0.1, loss, net, mode="max")


def test_a_module_that_keeps_what_it_computed_is_scanned_and_left_as_it_was():
    net = _net()
    net.kept = net(torch.randn(2, 64))
    net[0].eval()
    before = torch.get_rng_state()
    found = scan_sensitivity(net, _judge, ["int8"])
    found.mixed(1.0, _judge, net)
    assert net.kept.requires_grad and [part.training for part in net] == [False, True, True]
    assert torch.equal(torch.get_rng_state(), before)
    assert found == scan_sensitivity(net, _judge, ["int8"])


def test_names_with_brackets_are_names_of_what_they_name():
    net = nn.ModuleDict({"a[0]": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    found = scan_sensitivity(net, lambda _: 1.0, ["int8"])
    assert [trial.weight for trial in found.trials if trial.scheme] == ["a[0].weight", "b.weight"]
    recipe = Recipe.from_dict({"quantize": [{"scheme": "int8", "include": "a*"}, "nf4"]})
    recipe.apply(net)
    assert [type(layer.weight).__name__ for layer in net.values()] == ["Int8Weight", "NF4Weight"]


def test_bounds_that_nothing_meets_are_refused_by_name():
    net = _net()

    def judge(module):
        return 1.0 if all(type(layer.weight).__name__ == "Parameter" for layer in module) else 0.0

    with pytest.raises(ValueError, match="no weight of Sequential can be quantized"):
        scan_sensitivity(net, judge, ["int8"]).mixed(0.1, judge, net)
    with pytest.raises(ValueError, match="neither 'max' nor 'min'"):
        scan_sensitivity(net, judge, mode="best")
    with pytest.raises(ValueError, match="'int3' is not known"):
        scan_sensitivity(net, lambda _: pytest.fail("it was judged first"), ["int8", "int3"])
