"""Remember what a forward and backward change, to undo a failed one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.techniques.host_random import HostRandomState, generators_of


class StepSnapshot:
    """What one training step of ``module`` changes: random state, buffers, gradients.

    The random state is that of torch (CPU and the current CUDA device), Python and NumPy, and of generators that are
    attributes of the module or of its submodules. Buffers are copied where
    they are, pending gradients to host memory: there may be as many of them as parameters, and device memory is what
    is short.

    Args:
        module: The module about to be run.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> snapshot = StepSnapshot(model)
        >>> model(torch.randn(4, 2)).sum().backward()
        >>> snapshot.restore()
        >>> int(model.num_batches_tracked), model.weight.grad
        (0, None)
    """

    def __init__(self, module: nn.Module) -> None:
        self._restore_random_state = _random_state(module)
        self._buffers = [
            (owner, name, buffer, buffer.clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._gradients = [
            (parameter, parameter.grad, None if parameter.grad is None else _to_host(parameter.grad))
            for parameter in module.parameters()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back; may be called again after another step."""
        self._restore_random_state()
        for owner, name, buffer, content in self._buffers:
            buffer.copy_(content)
            owner._buffers[name] = buffer
        for parameter, gradient, value in self._gradients:
            if gradient is not None and value is not None:
                gradient.copy_(value)  # in place: it may be a view of a communication bucket
            parameter.grad = gradient


def _to_host(gradient: Tensor) -> Tensor:
    return gradient.detach().to("cpu", copy=True)


def _random_state(module: nn.Module) -> Callable[[], None]:
    """Take the state of each generator; the function returned brings it back."""
    generators: list[tuple[Callable[[Any], Any], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    host = HostRandomState(generators_of(module))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))

    def restore() -> None:
        host.restore()
        for set_state, state in generators:
            set_state(state)

    return restore
