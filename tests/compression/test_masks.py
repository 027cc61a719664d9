"""Pruning by masks: exact targets, nothing that compounds, one bit an element, and all that torch has itself."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_memopt.compression.choose import Choice
from lightning_memopt.compression.masks import Masks, find_sparsity, prune_weights
from lightning_memopt.compression.patterns import Channels
from lightning_memopt.compression.quantize import quantize
from lightning_memopt.compression.selection import WeightFilter, select_weights
from tests.zoo import ZOO, cases


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.BatchNorm1d(10))


def _zeros(module: nn.Module) -> int:
    return sum(int((parameter == 0).sum()) for name, parameter in module.named_parameters() if "bias" not in name)


@pytest.mark.parametrize("name", cases(without=["late_mlp"]))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_of_zeros_is_the_one_asked_for_and_only_weights_are_touched(name, scope):
    module = ZOO[name].build()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    masks = prune_weights(module, 0.7, scope=scope, embeddings=True)
    total = sum(weight.parameter.numel() for weight in masks.weights.values())
    rounding = len(masks.weights) / 2 if scope == "layer" else 0.5
    assert abs(masks.sparsity - 0.7) * total <= rounding + 1e-6
    state, skipped = module.state_dict(), select_weights(module, embeddings=True).skipped
    assert list(state) == list(before)
    for key in skipped:
        assert torch.equal(state[key], before[key])
    assert masks.nbytes <= total / 8 + len(masks.weights)


def test_no_element_that_is_kept_is_smaller_than_one_that_is_pruned_over_all_layers():
    net = _net()
    before = torch.cat([net[0].weight.detach().abs().view(-1), net[2].weight.detach().abs().view(-1)])
    masks = prune_weights(net, 0.6, scope="global")
    pruned = torch.cat([masks.of("0.weight").view(-1), masks.of("2.weight").view(-1)])
    assert int(pruned.sum()) == round(0.6 * 900)
    assert before[pruned].max() < before[~pruned].min()


def test_equal_scores_are_pruned_by_position_up_to_the_exact_count():
    layer = nn.Linear(10, 10)
    nn.init.constant_(layer.weight, 0.5)
    masks = prune_weights(layer, 0.37)
    assert masks.of("weight").view(-1).tolist() == [True] * 37 + [False] * 63


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_pruned_to_the_same_share(dtype):
    net = _net().to(dtype)
    prune_weights(net, 0.5, scope="global")
    assert _zeros(net) == 450


def test_pruning_again_to_the_same_target_prunes_nothing_more_and_to_a_higher_one_keeps_what_was_pruned():
    net = _net()
    masks = prune_weights(net, 0.5)
    first = masks.of("0.weight")
    for _ in range(3):
        masks.prune(0.5, Choice())
    masks.apply()
    assert masks.sparsity == 0.5 and torch.equal(masks.of("0.weight"), first)
    with torch.no_grad():
        net[0].weight[first] = 9.0  # as if something wrote over it
    masks.prune(0.8, Choice())
    assert masks.of("0.weight")[first].all() and masks.sparsity == pytest.approx(0.8)


def test_a_lower_target_than_what_is_pruned_already_gives_nothing_back():
    masks = prune_weights(_net(), 0.8)
    first = masks.of("0.weight")
    masks.prune(0.3, Choice())
    assert torch.equal(masks.of("0.weight"), first)


def test_pruned_channels_never_exceed_the_target_whatever_their_sizes():
    net = _net()
    masks = prune_weights(net, 0.5, pattern="outputs", scope="global")
    assert 0.45 < masks.sparsity <= 0.5
    assert prune_weights(_net(), 0.51, pattern="outputs").of("2.weight").all(1).sum() == 5


def test_pruning_in_steps_towards_two_of_four_stays_within_what_it_will_prune():
    net = _net()
    masks = Masks(select_weights(net, "0").weights)
    for target in (0.1, 0.3, 0.5):
        masks.prune(target, Choice(pattern="2:4"))
        masks.apply()
        assert masks.sparsity == pytest.approx(target)
        assert masks.of("0.weight").unflatten(-1, (-1, 4)).sum(-1).max() <= 2


def test_random_pruning_depends_on_the_seed_and_the_name_alone():
    first, again, other = (prune_weights(_net(i), 0.5, method="random", seed=s) for i, s in ((0, 0), (1, 0), (0, 1)))
    assert torch.equal(first.of("0.weight"), again.of("0.weight"))
    assert not torch.equal(first.of("0.weight"), other.of("0.weight"))


def test_saliency_prunes_where_weight_times_gradient_is_smallest_and_names_what_has_no_gradient():
    net = _net()
    with pytest.raises(ValueError, match=r"'0.weight' has no gradient"):
        prune_weights(net, 0.5, method="saliency")
    net(torch.randn(8, 20)).square().sum().backward()
    scores = (net[0].weight * net[0].weight.grad).abs().detach()
    pruned = prune_weights(net, 0.5, method="saliency").of("0.weight")
    assert scores[pruned].max() <= scores[~pruned].min()


def test_an_optimizer_that_is_held_cannot_revive_what_is_pruned_until_it_is_let_go():
    net = _net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        net(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()

    step()
    masks = prune_weights(net, 0.5)
    masks.hold([optimizer])
    for _ in range(3):
        step()
        assert (net[0].weight[masks.of("0.weight")] == 0).all() and find_sparsity(net)["0.weight"] == 0.5
    masks.remove()
    step()
    assert not find_sparsity(net)


def test_masks_of_transposed_memory_reach_the_right_elements():
    conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    before = conv.weight.detach().abs().clone()
    masks = prune_weights(conv, 0.5)
    pruned = masks.of("weight")
    assert torch.equal(conv.weight == 0, pruned) and before[pruned].max() < before[~pruned].min()


def test_a_state_restores_the_masks_and_one_of_another_module_is_refused_by_name():
    masks = prune_weights(_net(), 0.5)
    net = _net(1)
    restored = Masks(select_weights(net).weights)
    restored.load_state_dict(masks.state_dict())
    restored.apply()
    assert torch.equal(net[0].weight == 0, masks.of("0.weight"))
    with pytest.raises(ValueError, match=r"'0.weight', which is not among the weights to prune"):
        Masks(select_weights(net, "2").weights).load_state_dict(masks.state_dict())


@pytest.mark.parametrize("amount", [0, 1, -0.5, 1.5, 2, True, "half", float("nan")])
def test_an_amount_that_is_no_share_is_refused(amount):
    with pytest.raises(ValueError, match=r"amount=.* is no share of the weights"):
        prune_weights(_net(), amount)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_share_just_below_all_leaves_one_element(scope):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    prune_weights(net, 0.999999, scope=scope)
    left = [int(layer.weight.count_nonzero()) for layer in net]
    assert left == [1, 1] if scope == "layer" else sum(left) == 1


@pytest.mark.parametrize(("how", "message"), [({"method": "l1"}, "method='l1'"), ({"scope": "all"}, "scope='all'")])
def test_an_unknown_method_or_scope_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        prune_weights(_net(), 0.5, **how)


class TestAgainstTorchNnUtilsPrune:
    """Everything that torch.nn.utils.prune offers, with the same elements pruned."""

    def test_l1_unstructured(self):
        ours, theirs = _net(), _net()
        prune_weights(ours, 0.3)
        for layer in (theirs[0], theirs[2]):
            prune.l1_unstructured(layer, "weight", amount=0.3)
            prune.remove(layer, "weight")
        assert all(torch.equal(ours[i].weight, theirs[i].weight) for i in (0, 2))

    def test_global_l1(self):
        ours, theirs = _net(), _net()
        prune_weights(ours, 0.3, scope="global")
        prune.global_unstructured([(theirs[0], "weight"), (theirs[2], "weight")], prune.L1Unstructured, amount=0.3)
        assert all(torch.equal(ours[i].weight, theirs[i].weight) for i in (0, 2))

    @pytest.mark.parametrize("norm", [1, 2, float("inf")])
    @pytest.mark.parametrize(("side", "dimension"), [("outputs", 0), ("inputs", 1)])
    def test_ln_structured(self, norm, side, dimension):
        ours, theirs = _net(), _net()
        prune_weights(ours, 0.5, pattern=Channels(side, norm))
        for layer in (theirs[0], theirs[2]):
            prune.ln_structured(layer, "weight", 0.5, n=norm, dim=dimension)
        assert all(torch.equal(ours[i].weight, theirs[i].weight) for i in (0, 2))

    def test_random_unstructured_and_structured_prune_as_many(self):
        assert _zeros(prune_and_return(method="random")) == 450
        rows = prune_and_return(method="random", pattern="outputs")[0].weight.eq(0).all(1)
        assert rows.sum() == 15

    def test_custom_from_mask_on_top_of_what_is_pruned(self):
        net = _net()
        masks = prune_weights(net, 0.5)
        keep = torch.rand(30, 20) > 0.5
        already = masks.of("0.weight")
        masks.keep({"0.weight": keep})
        masks.apply()
        assert torch.equal(net[0].weight == 0, already | ~keep)
        with pytest.raises(ValueError, match=r"mask of '0.weight' has shape \(3,\), and the weight is \(30, 20\)"):
            masks.keep({"0.weight": torch.ones(3)})

    def test_identity_remove_and_is_pruned(self):
        net = _net()
        masks = Masks(select_weights(net).weights)
        masks.apply()
        assert masks.sparsity == 0 and find_sparsity(net) == {}
        prune_weights(net, 0.5)
        assert find_sparsity(net) == {"0.weight": 0.5, "2.weight": 0.5}
        assert type(net[0].weight) is nn.Parameter and not net[0]._forward_pre_hooks


def prune_and_return(**how) -> nn.Sequential:
    net = _net()
    prune_weights(net, 0.5, **how)
    return net


def test_what_is_pruned_is_seen_after_quantization_and_where_nothing_can_be_pruned_there_is_none():
    net = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(4), nn.LayerNorm(4))
    prune_weights(net, 0.5, include="0")
    quantize(net, "int8", WeightFilter(include="0"))
    assert find_sparsity(net) == {"0.weight": pytest.approx(0.5, abs=0.01)}
    assert find_sparsity(nn.LayerNorm(4)) == {}


def test_what_torch_masks_counts_before_and_after_its_mask_is_removed():
    net = _net()
    prune.l1_unstructured(net[0], "weight", 0.25)
    prune.random_unstructured(net[0], "bias", 0.5)
    assert find_sparsity(net) == {"0.weight": 0.25} and find_sparsity(net[0]) == {"weight": 0.25}
    prune.remove(net[0], "weight")
    assert find_sparsity(net) == {"0.weight": 0.25}


@pytest.mark.parametrize("pattern", ["elements", "outputs"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_pruning_by_another_seed_meets_the_same_target_and_adds_nothing(pattern, scope):
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    prune_weights(net, 0.25, method="random", pattern=pattern, scope=scope)
    first = [net[place].weight == 0 for place in (0, 1)]
    prune_weights(net, 0.5, method="random", seed=1, pattern=pattern, scope=scope)
    assert _zeros(net) == 1024
    assert all((net[place].weight[zeros] == 0).all() for place, zeros in enumerate(first))


def test_weights_that_are_zero_all_over_are_pruned_at_random_places():
    layer = nn.Linear(64, 64)
    nn.init.zeros_(layer.weight)
    rows = prune_weights(layer, 0.5, method="random").of("weight").sum(1)
    assert rows.min() > 16 and rows.max() < 48
