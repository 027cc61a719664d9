import pytest
import torch
from torch import nn

from lightning_memopt.techniques.checkpointing.budget import plan_budget, products_to_keep
from lightning_memopt.techniques.checkpointing.profile import Operator, RegionProfile, profile_region
from tests.zoo import ZOO

aten = torch.ops.aten


def _region(*costs: float, size: int = 10, input_bytes: int = 10) -> RegionProfile:
    """A region whose operators each make ``size`` bytes that the backward needs."""
    operators = (Operator(("op", i), size, size, True, 0, cost, True, True) for i, cost in enumerate(costs))
    return RegionProfile(tuple(operators), input_bytes)


def _kept(keep) -> list[int] | None:
    return None if keep is None else sorted(keep.get("op", ()))


def test_what_takes_longest_to_recompute_per_byte_is_kept_first() -> None:
    regions = [(_region(1, 9, 5), 1), (_region(8, 2, 4), 1), (_region(0, 0, 0), 1)]
    # Inputs 30, kept 30, and what the last region recomputes 30: 90 of 120.
    plan = plan_budget(regions, 0.75)
    assert [_kept(keep) for keep in plan.keep[:2]] == [[1, 2], [0]]
    assert plan.plain_bytes == 120
    assert plan.peak_bytes <= 90


def test_the_last_region_is_kept_whole_when_it_would_be_recomputed_at_the_peak_anyway() -> None:
    plan = plan_budget([(_region(1, 1), 1)] * 3, 0.6)
    assert [_kept(keep) for keep in plan.keep] == [[], [], None]
    assert plan.peak_bytes == 50


def test_the_peak_never_exceeds_the_budget_where_that_can_be_reached() -> None:
    regions = [(_region(3, 1, 4, 1, 5, size=7 + i), 1) for i in range(8)]
    for budget in (0.3, 0.4, 0.6, 0.9, 1.0):
        plan = plan_budget(regions, budget)
        assert plan.peak_bytes <= budget * plan.plain_bytes
    assert all(keep is None for keep in plan_budget(regions, 1.0).keep)


def test_a_region_that_is_called_three_times_holds_three_times_what_it_keeps() -> None:
    regions = [(_region(5, 1), 3), (_region(4, 4), 1)]
    plan = plan_budget(regions, 0.8)
    assert plan.plain_bytes == 3 * 30 + 30
    assert _kept(plan.keep[0]) == [0]


def _block_profile(dropout: float = 0.0) -> RegionProfile:
    module = ZOO["gpt2"].build(dropout)
    hidden = torch.zeros(8, 16, 32, requires_grad=True)
    return profile_region(module.model.transformer.h[0], (hidden,), {})


def test_the_selective_rule_keeps_projections_that_the_backward_reads_and_not_those_that_feed_a_sum() -> None:
    keep = products_to_keep(_block_profile())
    qkv, output, widen, narrow = range(4)
    assert keep[aten.addmm.default] == {qkv, widen}
    assert output not in keep[aten.addmm.default]  # only added to the residual
    assert narrow not in keep[aten.addmm.default]  # after the last tensor that is needed


def test_with_dropout_the_last_projection_would_be_run_again_and_is_kept() -> None:
    assert 3 in products_to_keep(_block_profile(dropout=0.1))[aten.addmm.default]


def test_what_draws_random_numbers_is_never_kept() -> None:
    drawn = [op for op in _block_profile(dropout=0.1).operators if "bernoulli" in str(op.key[0])]
    assert drawn
    assert not any(op.keepable for op in drawn)


def test_what_is_changed_in_place_is_never_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh())
    profile = profile_region(net, (torch.zeros(2, 4),), {})
    first, second = (op for op in profile.operators if op.flops)
    assert not first.keepable
    assert second.keepable


def test_profiling_counts_what_plain_autograd_saves_and_touches_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    profile = profile_region(net, (torch.zeros(16, 4),), {})
    linear, statistics, tanh = 16 * 8 * 4, 2 * 8 * 4, 16 * 8 * 4
    assert profile.plain_bytes == linear + statistics + tanh
    assert profile.input_bytes == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


def test_attention_without_a_registered_formula_has_the_operations_of_its_two_products() -> None:
    q = torch.zeros(2, 3, 5, 8, requires_grad=True)

    class Attention(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    profile = profile_region(Attention(), (q,), {})
    assert sum(op.flops for op in profile.operators) == pytest.approx(2 * (2 * 2 * 3 * 5 * 5 * 8))
