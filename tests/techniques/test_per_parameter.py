"""Stepping one parameter at a time gives what stepping all at once gives, or is refused."""

import warnings

import pytest
import torch
from torch import nn

from lightning_memopt.techniques.per_parameter import check_steps_alone, find_group, step_one

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "maximize": lambda p: torch.optim.AdamW(p, lr=0.1, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1),
}


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(3)]


def _set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stepping_one_by_one_gives_the_weights_and_state_of_stepping_all_at_once(name):
    plain, one_by_one = _parameters(), _parameters()
    reference, optimizer = OPTIMIZERS[name](plain), OPTIMIZERS[name](one_by_one)
    check_steps_alone(optimizer)
    for step in range(5):
        _set_gradients(plain, step)
        _set_gradients(one_by_one, step)
        reference.step()
        for parameter in reversed(one_by_one):
            step_one(optimizer, parameter)
    for expected, actual in zip(plain, one_by_one, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_each_parameter_is_stepped_with_the_hyper_parameters_its_group_has_now():
    first, second = _parameters()[:2]
    before = second.detach().clone()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    optimizer.param_groups[1]["lr"] = 0.25
    _set_gradients([first, second], 0)
    step_one(optimizer, second)
    torch.testing.assert_close(second.detach(), before - 0.25 * second.grad)


def test_step_hooks_are_left_to_the_whole_step_and_schedulers_see_no_step():
    parameters = _parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    _set_gradients(parameters, 0)
    step_one(optimizer, parameters[0])
    assert calls == []
    optimizer.step()
    assert calls == ["pre", "post"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_the_groups_are_put_back_when_the_step_raises():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    parameters = _parameters()
    optimizer = Failing(parameters, lr=0.1)
    groups = optimizer.param_groups
    with pytest.raises(RuntimeError, match="out of memory"):
        step_one(optimizer, parameters[0])
    assert optimizer.param_groups is groups


def test_a_parameter_of_another_model_is_refused():
    optimizer = torch.optim.SGD(_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) is in no group of SGD"):
        find_group(optimizer, _parameters()[0])


def test_lbfgs_is_refused_by_name():
    with pytest.raises(ValueError, match="LBFGS cannot step one parameter at a time"):
        check_steps_alone(torch.optim.LBFGS(_parameters()))


def test_an_optimizer_that_counts_steps_in_its_group_is_accepted_as_the_step_without_gradients_counts():
    class CountsInGroup(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter -= group["lr"] / group["count"] * parameter.grad

    check_steps_alone(CountsInGroup(_parameters(), lr=0.1))


def test_an_optimizer_that_scales_by_the_norm_of_all_gradients_is_refused():
    class NormalizedSGD(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            for parameter in parameters:
                parameter -= self.param_groups[0]["lr"] * parameter.grad / norm

    with pytest.raises(ValueError, match="NormalizedSGD steps its parameters jointly"):
        check_steps_alone(NormalizedSGD(_parameters(), lr=0.1))


def test_an_optimizer_that_changes_parameters_without_a_gradient_is_refused():
    class Decays(torch.optim.AdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                torch._foreach_mul_([parameter.data for parameter in group["params"]], 0.999)
            return loss

    with pytest.raises(ValueError, match=r"Decays steps its parameters jointly: .* a step that found no"):
        check_steps_alone(Decays(_parameters()))


def test_checking_changes_neither_the_optimizer_nor_the_random_numbers():
    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    state, before = torch.get_rng_state(), [p.detach().clone() for p in parameters]
    check_steps_alone(optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_an_optimizer_that_adds_noise_to_each_parameter_is_accepted():
    class Langevin(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    parameter -= group["lr"] * parameter.grad + torch.randn_like(parameter)

    check_steps_alone(Langevin(_parameters(), lr=0.1))
