"""Ctrl-C in the middle of a step leaves the module as the user wrote it, whichever technique was at work."""

import signal
from collections.abc import Callable
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.parity import train
from tests.test_composition import TECHNIQUES
from tests.zoo import ZOO

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture(autouse=True)
def _restore_the_handler_of_interrupts():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from the first one on


def hooks(module: nn.Module) -> list[str]:
    of_modules = [f"{name}.{kind}" for name, part in module.named_modules() for kind in HOOKS if getattr(part, kind)]
    of_parameters = [
        name
        for name, parameter in module.named_parameters()
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    ]
    return of_modules + of_parameters


def attributes(module: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(part)) for name, part in module.named_modules()}


def interrupt_in_the_forward(module: pl.LightningModule) -> Any:
    def interrupt(*_: Any) -> None:
        if module.global_step == 1:
            raise KeyboardInterrupt

    return module.get_submodule("model.transformer.h.1").register_forward_hook(interrupt)


def interrupt_in_the_backward(module: pl.LightningModule) -> Any:
    def interrupt(_: Any) -> None:
        if module.global_step == 1:
            raise KeyboardInterrupt

    return module.get_parameter("model.transformer.h.0.ln_1.weight").register_hook(interrupt)


def interrupted(interrupt: Callable[[pl.LightningModule], Any], **options: Any) -> pl.LightningModule:
    module = ZOO["gpt2"].build()
    hook = interrupt(module)
    with pytest.raises(SystemExit):
        train(module, ZOO["gpt2"].loader(batches=4), steps=3, **options)
    hook.remove()
    return module


@cache
def attributes_after_a_plain_fit(interrupt: Callable[[pl.LightningModule], Any]) -> dict[str, set[str]]:
    return attributes(interrupted(interrupt))


@pytest.mark.parametrize("interrupt", [interrupt_in_the_forward, interrupt_in_the_backward])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_an_interrupted_fit_leaves_the_module_as_the_user_wrote_it(name, interrupt):
    entry, module = ZOO["gpt2"], interrupted(interrupt, **TECHNIQUES[name].options())
    assert attributes(module) == attributes_after_a_plain_fit(interrupt)
    assert hooks(module) == []
    fresh = entry.build()
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert [p.dtype for p in module.parameters()] == [p.dtype for p in fresh.parameters()]

    fresh.load_state_dict(module.state_dict())
    gradients = []
    for either in (module, fresh):
        either.train()
        either.zero_grad()
        either.log = lambda *args, **options: None
        torch.manual_seed(0)
        either.training_step(entry.batch(), 0).backward()
        gradients.append([parameter.grad for parameter in either.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
