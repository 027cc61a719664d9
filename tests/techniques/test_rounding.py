import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.techniques.rounding import COMPENSATION, RandomBits, RoundedUpdates, round_stochastically


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-39, 1234.5, -7.77e-20])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(value):
    count = 100_000
    rounded = round_stochastically(torch.full((count,), value), RandomBits(0))
    assert rounded.dtype == torch.bfloat16
    low, high = rounded.min().double(), rounded.max().double()
    exact = torch.tensor(value).double()
    assert low <= exact <= high
    assert len(rounded.unique()) == 2
    # The mean of `count` draws between two neighbours is within 5 standard errors of the number itself.
    assert (rounded.double().mean() - exact).abs() <= 5 * (high - low) / 2 / count**0.5


def test_numbers_that_fit_are_left_alone_and_so_are_infinities_and_nan():
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(exact, RandomBits(0)).float(), exact)
    every_nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(every_nan, RandomBits(0)).isnan().all()


def test_rounding_leaves_the_global_random_numbers_alone_and_continues_from_a_saved_state():
    bits, tensor = RandomBits(3), torch.full((100,), 1.001)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    round_stochastically(tensor, bits)
    assert torch.equal(torch.rand(3), expected)

    bits.advance()
    state = copy.deepcopy(bits.state_dict())
    ahead = round_stochastically(tensor, bits)
    resumed = RandomBits(99)
    resumed.load_state_dict(state)
    assert torch.equal(round_stochastically(tensor, resumed), ahead)
    bits.advance()
    assert not torch.equal(round_stochastically(tensor, bits), ahead)


def test_what_ranks_have_in_common_is_rounded_alike_beside_parts_of_other_sizes_and_parameters_without_gradients():
    def step(size: int, has_gradient: bool) -> list[torch.Tensor]:
        part, common, other = _parameter(size=size), _parameter(), _parameter()
        optimizer = torch.optim.SGD([part, common, other], lr=1e-3)
        RoundedUpdates(optimizer, "stochastic", RandomBits(0))
        for _ in range(2):
            for parameter in (part, common, other) if has_gradient else (common, other):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return [common, other]

    common, other = step(10, True)
    assert not torch.equal(common, other)
    for size, has_gradient in ((11, True), (10, False)):
        assert all(map(torch.equal, step(size, has_gradient), (common, other)))


def _parameter(dtype=torch.bfloat16, size=1000):
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter((1 + torch.rand(size, generator=generator)).to(dtype))


def _train(parameter, optimizer, steps, rounding=None, seed=0):
    updates = RoundedUpdates(optimizer, rounding, RandomBits(seed)) if rounding else None
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        parameter.grad = (1 + 0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        optimizer.step()
    if updates is not None:
        updates.remove()
    return parameter.detach().float()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD([p], lr=1e-4),
    "adamw": lambda p: torch.optim.AdamW([p], lr=1e-4),
    "rmsprop": lambda p: torch.optim.RMSprop([p], lr=1e-4, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor([p], lr=1e-4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_too_small_for_nearest_rounding_are_kept_by_kahan_and_on_average_by_stochastic(name):
    steps, make = 50, OPTIMIZERS[name]
    start = _parameter().detach().float()

    def moved(rounding):
        parameter = _parameter()
        optimizer = make(parameter)
        weight = _train(parameter, optimizer, steps, rounding)
        return weight - start, weight + optimizer.state[parameter].get(COMPENSATION, 0) - start

    single = nn.Parameter(start.clone())
    exact = _train(single, make(single), steps) - start
    way = exact.abs().mean()
    if name != "adafactor":  # its steps are relative to the weight's size, some larger than half of a last bit
        assert moved("nearest")[0].abs().mean() < 0.05 * way
    assert (moved("stochastic")[0] - exact).mean().abs() < 0.1 * way
    last_bit = 2.0**-7  # of numbers between 1 and 2
    stored, with_compensation = moved("kahan")
    assert (stored - exact).abs().max() < 0.6 * last_bit
    assert (with_compensation - exact).abs().max() < 0.05 * way


def test_adamw_state_is_float32_and_its_second_moment_moves_as_in_float32():
    parameter, single = _parameter(), nn.Parameter(_parameter().detach().float())
    optimizer, reference = (torch.optim.AdamW([p], lr=1e-3) for p in (parameter, single))
    _train(parameter, optimizer, 300, "stochastic")
    _train(single, reference, 300)
    second = optimizer.state[parameter]["exp_avg_sq"]
    assert second.dtype == torch.float32
    torch.testing.assert_close(second, reference.state[single]["exp_avg_sq"], rtol=0.01, atol=0)


def test_the_same_seed_gives_the_same_weights():
    first, second, third = (
        _train(parameter, torch.optim.SGD([parameter], lr=1e-3), 5, "stochastic", seed)
        for parameter, seed in ((_parameter(), 0), (_parameter(), 0), (_parameter(), 1))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_a_resumed_optimizer_continues_bit_for_bit(rounding):
    straight = _parameter()
    optimizer = torch.optim.AdamW([straight], lr=1e-4)
    bits = RandomBits(0)
    RoundedUpdates(optimizer, rounding, bits)

    def step(parameter, optimizer):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    for _ in range(5):
        step(straight, optimizer)
    saved = copy.deepcopy((straight.data, optimizer.state_dict(), bits.state_dict()))
    for _ in range(5):
        step(straight, optimizer)

    resumed = nn.Parameter(saved[0])
    other, other_bits = torch.optim.AdamW([resumed], lr=1.0), RandomBits(7)
    RoundedUpdates(other, rounding, other_bits)
    other.load_state_dict(saved[1])
    other_bits.load_state_dict(saved[2])
    assert resumed.dtype == torch.bfloat16
    assert other.state[resumed]["exp_avg"].dtype == torch.float32
    for _ in range(5):
        step(resumed, other)
    assert torch.equal(resumed, straight)
    for key, value in optimizer.state[straight].items():
        assert torch.equal(other.state[resumed][key], value), key
        assert other.state[resumed][key].dtype == value.dtype, key


def test_kahan_keeps_one_16_bit_tensor_for_each_parameter():
    parameter = _parameter()
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    _train(parameter, optimizer, 1, "kahan")
    assert optimizer.state[parameter][COMPENSATION].dtype == torch.bfloat16
    assert optimizer.state[parameter][COMPENSATION].shape == parameter.shape


def test_gradients_types_and_hooks_are_as_before_after_a_step_and_after_removal():
    half, single = _parameter(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([half, single], lr=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    updates = RoundedUpdates(optimizer, "nearest")
    half.grad, single.grad = torch.ones_like(half), torch.ones(3)
    gradient = half.grad
    optimizer.step()
    assert half.grad is gradient and half.dtype == torch.bfloat16
    assert torch.equal(single, torch.full((3,), 0.5))
    assert calls == [1]
    updates.remove()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_step_that_raises_leaves_the_weight_and_its_state_as_they_were():
    parameter = _parameter()
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    updates = RoundedUpdates(optimizer, "kahan")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before, keys = parameter.detach().clone(), set(optimizer.state[parameter])
    with pytest.raises(ZeroDivisionError), updates.in_float32(parameter) as precise:
        assert precise.dtype == torch.float32
        precise += 1
        raise ZeroDivisionError
    assert torch.equal(parameter, before)
    assert set(optimizer.state) == {parameter} and set(optimizer.state[parameter]) == keys


def test_state_that_was_saved_in_16_bits_is_loaded_in_float32():
    saved, parameter = _parameter(), _parameter()
    plain = torch.optim.AdamW([saved])
    saved.grad = torch.ones_like(saved)
    plain.step()
    optimizer = torch.optim.AdamW([parameter])
    RoundedUpdates(optimizer, "nearest")
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state[parameter]["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(
        optimizer.state[parameter]["exp_avg_sq"], plain.state[saved]["exp_avg_sq"].float(), rtol=0, atol=0
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_it_runs_on_fake_tensors(rounding):
    with FakeTensorMode():
        parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW([parameter])
        RoundedUpdates(optimizer, rounding, RandomBits(0))
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert parameter.dtype == torch.bfloat16
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32


def test_unknown_rounding_and_missing_random_bits_are_refused():
    optimizer = torch.optim.SGD([_parameter()], lr=0.1)
    with pytest.raises(ValueError, match="'up' is unknown; possible are 'nearest', 'stochastic', 'kahan'"):
        RoundedUpdates(optimizer, "up")
    with pytest.raises(ValueError, match="random bits"):
        RoundedUpdates(optimizer, "stochastic")
