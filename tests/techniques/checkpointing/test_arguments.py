"""What blocks are given, and what they write to it."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memopt.techniques.checkpointing import checkpoint_activations
from lightning_memopt.techniques.checkpointing.arguments import take_apart
from tests.techniques.checkpointing.policies import POLICIES


@dataclass
class Carried:
    hidden: torch.Tensor
    means: list[torch.Tensor] = field(default_factory=list)
    calls: int = 0


class Plain:
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden, self.means, self.calls = hidden, [], 0


class Slotted:
    __slots__ = ("calls", "hidden", "means")

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden, self.means, self.calls = hidden, [], 0


class OwnDict(dict):  # type: ignore[type-arg]
    pass


STATES: dict[str, Callable[[torch.Tensor], Any]] = {
    "dataclass": Carried,
    "object": Plain,
    "slots": Slotted,
    "namespace": lambda hidden: SimpleNamespace(hidden=hidden, means=[], calls=0),
    "dict": lambda hidden: {"hidden": hidden, "means": [], "calls": 0},
    "dict of its own class": lambda hidden: OwnDict(hidden=hidden, means=[], calls=0),
    "mapping": lambda hidden: UserDict(hidden=hidden, means=[], calls=0),
}


def _get(state: Any, name: str) -> Any:
    return state[name] if isinstance(state, dict | UserDict) else getattr(state, name)


def _set(state: Any, name: str, value: Any) -> None:
    if isinstance(state, dict | UserDict):
        state[name] = value
    else:
        setattr(state, name, value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, state: Any) -> None:
        calls, hidden = _get(state, "calls") + 1, _get(state, "hidden")
        hidden = torch.sin(hidden + torch.tanh(self.linear(hidden)) * calls)
        _set(state, "calls", calls)
        _set(state, "hidden", hidden)
        _get(state, "means").append(hidden.square().mean())


class Returning(Block):
    def forward(self, state: Any) -> Any:
        return torch.sin(_get(state, "hidden") + torch.tanh(self.linear(_get(state, "hidden"))))


def _gradients(
    make: Callable[[torch.Tensor], Any], block: type[Block], policy: str | None
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    blocks = nn.ModuleList(block() for _ in range(4))
    handle = None
    if policy is not None:
        handle = checkpoint_activations(blocks, **POLICIES[policy], modules="*")
    for _ in range(2):  # the budget's plan is made in the second
        state = make(torch.linspace(0, 1, 16).reshape(2, 8))
        for one in blocks:
            out = one(state)
            if out is not None:
                _set(state, "hidden", out)
        blocks.zero_grad()
        (_get(state, "hidden").sum() + sum(_get(state, "means"))).backward()
    if handle is not None:
        handle.remove()
    return {name: parameter.grad.clone() for name, parameter in blocks.named_parameters()}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("block", [Block, Returning])
@pytest.mark.parametrize("state", STATES)
def test_what_is_written_to_an_argument_reaches_the_caller_and_no_replay(state, block, policy) -> None:
    plain, checkpointed = (_gradients(STATES[state], block, one) for one in (None, policy))
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


def test_what_an_object_holds_is_built_again_and_objects_within_themselves_are_left_alone() -> None:
    given = Carried(torch.zeros(2), [torch.ones(1)])
    given.itself = given  # type: ignore[attr-defined]
    leaves, build = take_apart((given, {"k": (1, None)}))
    (made, rest) = build(leaves)
    assert made is not given and type(made) is Carried and made.means is not given.means
    assert made.hidden is given.hidden and made.itself is given and rest == {"k": (1, None)}


def _in_place(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda block, x: block(x * 1), r"^0 changes an input of shape \(2, 8\) in place"),
        (lambda block, x: block(part for part in (x, x)), "^0 is given a generator, which is used up"),
        (lambda block, x: block(inputs=iter([x, x])), "^0 is given a list_iterator, which is used up"),
    ],
)
def test_an_input_that_cannot_be_given_twice_is_refused_by_the_blocks_name(call: Any, said: str) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, inputs: Any) -> torch.Tensor:
            return self.linear(_in_place(inputs) if isinstance(inputs, torch.Tensor) else sum(inputs))

    blocks = nn.ModuleList([Takes(), Takes()])
    with checkpoint_activations(blocks, "full", modules="*"), pytest.raises(RuntimeError, match=said):
        call(blocks[0], torch.ones(2, 8, requires_grad=True))
