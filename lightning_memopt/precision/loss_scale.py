"""The dynamic loss scale of fp16 training: what it does, what it reports, and when it gives up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

SMALLEST_SCALE = 1e-4
"""Below this, scaling shrinks gradients more than any overflow of a finite loss explains (the floor of fairseq)."""


class LossScaleCollapsedError(FloatingPointError):
    """The loss scale fell so low that no gradient can become finite by lowering it further."""


class LossScale:
    """A :class:`torch.amp.GradScaler` that counts what it skips and does not fall for ever.

    The scale changes when the next loss is scaled, not after each optimizer's step: several optimizers that share
    one backward must all unscale by the scale which that backward had.

    Args:
        device: Device type of the gradients, ``"cpu"`` or ``"cuda"``.
        options: ``init_scale``, ``growth_factor``, ``backoff_factor`` and ``growth_interval`` of the ``GradScaler``.

    Attributes:
        scaler: The ``GradScaler``.
        skipped_steps: How many updates were skipped since the start of training because a gradient overflowed.
    """

    def __init__(self, device: str, **options: Any) -> None:
        self.scaler = GradScaler(device=device, **options)
        self.skipped_steps = 0
        self._has_stepped = False

    @property
    def value(self) -> float:
        """The factor by which the next loss is multiplied."""
        return float(self.scaler.get_scale())

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` times the scale."""
        self.update()
        scaled: torch.Tensor = self.scaler.scale(loss)
        return scaled

    def step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step ``optimizer``, unless its gradients overflowed."""
        result = self.scaler.step(optimizer, **kwargs)
        self._has_stepped = True
        return result

    def update(self) -> None:
        """Lower the scale if a step was skipped since the last update, raise it after many that were not."""
        if not self._has_stepped:
            return
        before = self.value
        self.scaler.update()
        self.skipped_steps += self.value < before
        self._has_stepped = False

    def check(self, module: nn.Module) -> None:
        """Raise where the scale has collapsed: it cannot help the gradients that ``module`` has now.

        Raises:
            LossScaleCollapsedError: The scale is below :data:`SMALLEST_SCALE` and gradients are still not finite.
        """
        if self.value >= SMALLEST_SCALE:
            return
        parameters = list(module.named_parameters())
        gradients = _names_of_non_finite([(name, parameter.grad) for name, parameter in parameters])
        if not gradients:
            return
        weights = _names_of_non_finite(parameters)
        raise LossScaleCollapsedError(
            f"The fp16 loss scale collapsed to {self.value:.1e} after {self.skipped_steps} skipped steps: gradients "
            f"hold inf or NaN however low it is. Not finite are the gradients of {gradients}, and "
            f"{f'the weights {weights}' if weights else 'no weights'}. Likely causes: NaN in the data or the loss "
            "(log or division of 0), a learning rate at which training diverged, or activations beyond fp16's "
            "largest number, 65504. Remedies: MixedPrecision('bf16'), which has float32's range, a lower learning "
            "rate, or gradient_clip_val."
        )

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state and the count, with the pending change of the scale made."""
        self.update()
        return self.scaler.state_dict() | {"skipped_steps": self.skipped_steps}

    def __getstate__(self) -> dict[str, Any]:
        self.update()  # torch refuses to pickle a scaler with a pending change
        return self.__dict__

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, or from Lightning's own mixed precision, which counts nothing."""
        state = dict(state)
        self.skipped_steps = state.pop("skipped_steps", 0)
        self.scaler.load_state_dict(state)


def _names_of_non_finite(tensors: Sequence[tuple[str, torch.Tensor | None]], most: int = 3) -> str:
    names = [name for name, tensor in tensors if tensor is not None and not tensor.isfinite().all()]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
