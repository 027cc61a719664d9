"""Update 16-bit weights without a float32 copy of them: each is stepped in float32 and rounded back.

A 16-bit weight moves only when an update is at least half of its last bit: 1/512 of the weight in bfloat16. The
small updates late in training are lost altogether. Stochastic rounding keeps them on average, Kahan summation keeps
them exactly, in a second 16-bit tensor. Both after Zamirai et al., "Revisiting BFloat16 Training" (2020),
https://arxiv.org/abs/2010.06192.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memopt.techniques.per_parameter import step_one, surround_step

Rounding = Literal["nearest", "stochastic", "kahan"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "kahan")

COMPENSATION = "memopt_compensation"
"""The key in an optimizer's state under which Kahan summation keeps what rounding took from a weight."""


class RandomBits:
    """Random numbers for rounding, of their own: dropout and shuffling see the same numbers as without rounding.

    What is drawn depends on the seed, the step and what it is for, and on nothing that was drawn before: ranks hold
    other parameters than their neighbours, or parts of other sizes, and round alike what they have in common.

    Args:
        seed: Equal on all replicas of a model, which would drift apart otherwise.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0

    def like(self, tensor: torch.Tensor, number: int = 0) -> torch.Tensor:
        """16 random bits, as int32, for each element of ``tensor``, the parameter of this ``number``."""
        digest = blake2b(f"{self.seed} {self.step} {number}".encode(), digest_size=8).digest()
        generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest, "little"))
        return torch.randint(0, 2**16, tensor.shape, dtype=torch.int32, device=tensor.device, generator=generator)

    def advance(self) -> None:
        """Go on to the next step, which draws other numbers."""
        self.step += 1

    def state_dict(self) -> dict[str, int]:
        """The seed and the step; the same on all ranks and devices."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from :meth:`state_dict`."""
        self.seed, self.step = state["seed"], state["step"]


def round_stochastically(tensor: torch.Tensor, bits: RandomBits, number: int = 0) -> torch.Tensor:
    """Round float32 to bfloat16, up or down by chance, so that the mean is the number itself.

    bfloat16 is the upper half of float32. Adding 16 random bits to the lower half carries into the upper with a
    probability of just the fraction that cutting it off would lose.

    Args:
        tensor: float32, any shape; left as it is.
        bits: The source of the random bits.
        number: Which of the parameters of a step this is.

    Returns:
        bfloat16, the same shape. Infinities and NaN stay what they are.

    Example:
        >>> rounded = round_stochastically(torch.full((10_000,), 1.001), RandomBits(seed=0))
        >>> sorted({float(value) for value in rounded}), round(float(rounded.float().mean()), 3)
        ([1.0, 1.0078125], 1.001)
    """
    if isinstance(tensor, DTensor):  # each rank rounds its own elements
        local = round_stochastically(tensor.to_local(), bits, number)
        return DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
    rounded = bits.like(tensor, number).add_(tensor.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(tensor.isfinite(), rounded, tensor).to(torch.bfloat16)


class RoundedUpdates:
    """Lets an optimizer step its 16-bit parameters in float32, one at a time, and rounds them back.

    The optimizer's state is made from the float32 parameter, so it is float32: AdamW's second moment, which moves by
    a thousandth in a step, would stand still in bfloat16. It is also loaded in float32. Parameters in other types
    are stepped as always. :meth:`remove` undoes all of it.

    Args:
        optimizer: Any optimizer that steps each parameter by itself
            (:func:`~lightning_memopt.techniques.per_parameter.check_steps_alone`).
        rounding: ``"nearest"``, ``"stochastic"`` (bfloat16 only) or ``"kahan"`` (2 bytes more for each element, in
            the optimizer's state).
        bits: For stochastic rounding.

    Raises:
        ValueError: The rounding is unknown, or stochastic without random bits.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = torch.optim.SGD([weight], lr=0.001)
        >>> updates = RoundedUpdates(optimizer, "kahan")
        >>> for _ in range(10):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.item()
        0.98828125
        >>> updates.remove()
    """

    def __init__(self, optimizer: Optimizer, rounding: Rounding, bits: RandomBits | None = None) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} is unknown; possible are {', '.join(map(repr, ROUNDINGS))}.")
        if rounding == "stochastic" and bits is None:
            raise ValueError("rounding='stochastic' needs a source of random bits: RandomBits(seed).")
        self._optimizer = optimizer
        self._rounding = rounding
        self._bits = bits
        self._hidden: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._numbers: dict[torch.Tensor, int] = {}
        surround_step(optimizer, self.in_float32)
        self._hooks = (
            optimizer.register_step_pre_hook(self._step_16_bit_parameters),
            optimizer.register_step_post_hook(self._show_gradients),
            optimizer.register_load_state_dict_pre_hook(self._protect),
            optimizer.register_load_state_dict_post_hook(self._unprotect),
        )

    def remove(self) -> None:
        """Leave the optimizer as it was, but for its state, which stays float32."""
        for hook in self._hooks:
            hook.remove()
        surround_step(self._optimizer, None)

    @contextmanager
    def in_float32(self, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give a float32 copy of ``parameter``, with its gradient and state, to step; round it back on exit.

        A copy, since a parameter that changes its type loses the hooks that DDP has on its gradient. If the body
        raises, the parameter is as it was.
        """
        if not is_16_bit(parameter):
            yield parameter
            return
        states = self._optimizer.state
        state = states.pop(parameter, {})
        compensation = state.pop(COMPENSATION, None)
        precise = parameter.detach().float()
        if compensation is not None:
            precise += compensation
        precise.grad = None if parameter.grad is None else parameter.grad.float()
        if state:
            states[precise] = state
        try:
            yield precise
            rounded, compensation = self._round(precise, parameter)
            with torch.no_grad():
                parameter.copy_(rounded)
        finally:
            state = states.pop(precise, {})
            if compensation is not None:
                state[COMPENSATION] = compensation
            if state:
                states[parameter] = state

    def _round(self, precise: torch.Tensor, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._rounding == "stochastic":
            assert self._bits is not None
            if parameter not in self._numbers:  # groups may be added while training
                self._numbers = {p: number for number, p in enumerate(_parameters(self._optimizer))}
            return round_stochastically(precise, self._bits, self._numbers[parameter]), None
        rounded = precise.to(parameter.dtype)
        return rounded, (precise.sub_(rounded).to(parameter.dtype) if self._rounding == "kahan" else None)

    @torch.no_grad()
    def _step_16_bit_parameters(self, optimizer: Optimizer, *_: Any) -> None:
        """Step them before the optimizer's own loop, and hide their gradients from it."""
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None and is_16_bit(parameter):
                    step_one(optimizer, parameter, index)
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _show_gradients(self, *_: Any) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()
        if self._bits is not None:
            self._bits.advance()

    def _protect(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """``load_state_dict`` casts state to its parameter's type, but for ``step``: hide it from that."""
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        ours = {index for index, p in zip(saved, _parameters(optimizer), strict=False) if is_16_bit(p)}
        state = {
            index: {
                key: _Loading(value) if key != "step" and index in ours and torch.is_tensor(value) else value
                for key, value in values.items()
            }
            for index, values in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def _unprotect(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, _Loading):
                    state[key] = value.restore(key, parameter)


class _Loading:
    """Hides a tensor of an optimizer's state from ``load_state_dict``."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def restore(self, key: str, parameter: torch.Tensor) -> torch.Tensor:
        # State of a run that kept it in 16 bits is widened.
        dtype = torch.float32 if is_16_bit(self.tensor) and key != COMPENSATION else self.tensor.dtype
        return self.tensor.to(parameter.device, dtype, copy=True)


def is_16_bit(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is bfloat16 or float16."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
