"""Step each parameter as soon as its gradient is complete, and free the gradient at once."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_memopt.parallel.clipping import clip_by_value
from lightning_memopt.techniques.per_parameter import StepParameter, step_one


def step_in_backward(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    clip_value: float | None = None,
    step: StepParameter = step_one,
) -> "BackwardStepper":
    """Make every backward step the parameters of ``optimizers``, each one right after its gradient is complete.

    The training loop stays as it is: its ``optimizer.step()`` finds no gradients and changes nothing, but still
    runs the step hooks and keeps learning-rate schedulers content. The numbers are those of the plain loop, since
    a parameter is stepped only after the last operation of the backward that reads it.

    Parameters may be shards of FSDP2's, which calls the hooks of a shard once its gradient is reduced, or tensor
    parallel parts. Hooks that make a gradient complete (an average over ranks) have to be there before: hooks run in
    the order in which they were registered.

    Args:
        module: Owns the parameters; used to name them.
        optimizers: The optimizers; each must pass
            :func:`~lightning_memopt.techniques.per_parameter.check_steps_alone`.
        clip_value: Clamp each gradient to ``[-clip_value, clip_value]`` before its step.
        step: What steps one parameter, given the optimizer, the parameter and the index of its group.

    Returns:
        A handle whose ``remove()`` puts everything back.

    Raises:
        ValueError: A parameter is in two optimizers.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> handle = step_in_backward(net, [optimizer])
        >>> net(torch.ones(4, 2)).sum().backward()
        >>> net.weight.grad is None, len(optimizer.state)
        (True, 2)
        >>> optimizer.step()
        >>> handle.remove()
    """
    return BackwardStepper(module, optimizers, clip_value, step)


class BackwardStepper:
    """The handle of :func:`step_in_backward`: the hooks on the parameters and on the optimizers' steps.

    Attributes:
        is_within_step: Whether some parameters were stepped in a step that is not over: the others are yet to be.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Optimizer], clip_value: float | None, step: StepParameter
    ) -> None:
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._clip_value = clip_value
        self._step = step
        self._owners: dict[torch.Tensor, tuple[Optimizer, int]] = {}
        self._hooks: dict[torch.Tensor, RemovableHandle] = {}
        self._stepped: set[torch.Tensor] = set()
        self.is_within_step = False
        self._lock = threading.Lock()  # autograd runs one thread per device; a step swaps the optimizer's groups
        self._refuse_shared_parameters(optimizers)
        for optimizer in optimizers:
            self._watch(optimizer)
        self._step_hooks = [
            hook
            for optimizer in optimizers
            for hook in (
                optimizer.register_step_pre_hook(partial(self._begin_step, optimizer)),
                optimizer.register_step_post_hook(self._end_step),
            )
        ]

    def __reduce__(self) -> Any:
        return type(None), ()  # nothing is a copy of it: hooks stay on the parameters that they were put on

    def remove(self) -> None:
        """Take all hooks off; backward then leaves gradients to ``optimizer.step`` again."""
        for hook in (*self._hooks.values(), *self._step_hooks):
            hook.remove()
        self._hooks.clear()
        self._owners.clear()
        self._stepped.clear()

    def _refuse_shared_parameters(self, optimizers: Sequence[Optimizer]) -> None:
        seen: dict[torch.Tensor, Optimizer] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    other = seen.setdefault(parameter, optimizer)
                    if other is not optimizer:
                        raise ValueError(
                            f"{self._name(parameter)!r} is in two optimizers ({type(other).__name__} and "
                            f"{type(optimizer).__name__}), so one gradient would have to serve two steps; give each "
                            "parameter to one optimizer."
                        )

    def _watch(self, optimizer: Optimizer) -> None:
        """Hook what needs gradients now; parameters may be unfrozen, and groups added, while training."""
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                self._owners[parameter] = (optimizer, index)
                if parameter.requires_grad and parameter not in self._hooks:
                    self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _begin_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._watch(optimizer)
        self._stepped.difference_update(p for group in optimizer.param_groups for p in group["params"])

    def _end_step(self, *_: Any) -> None:
        self.is_within_step = False

    @torch.no_grad()
    def _on_gradient(self, parameter: torch.Tensor) -> None:
        optimizer, group_index = self._owners[parameter]
        with self._lock:
            if parameter in self._stepped:
                raise RuntimeError(
                    f"{self._name(parameter)!r} got a second gradient before `optimizer.step()` was called, but it "
                    "was stepped with its first. Call `optimizer.step()` after each backward; do not accumulate "
                    "gradients, and where activations are checkpointed, use `use_reentrant=False`."
                )
            self._stepped.add(parameter)
            self.is_within_step = True
            _wait_for_copy(parameter)
            if self._clip_value is not None:
                clip_by_value([parameter], self._clip_value)
            self._step(optimizer, parameter, group_index)
        parameter.grad = None

    def _name(self, parameter: torch.Tensor) -> str:
        return self._names.get(parameter, f"<parameter outside the module, shape {tuple(parameter.shape)}>")  # type: ignore[call-overload]


def _wait_for_copy(parameter: torch.Tensor) -> None:
    """Wait for the gradient of an offloaded shard: before torch 2.13 FSDP2 lets a copy to the host still run here."""
    if isinstance(parameter, DTensor) and parameter.device.type == "cpu" != parameter.device_mesh.device_type:
        torch.accelerator.current_stream().synchronize()
