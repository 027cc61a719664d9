"""Autocast, with a loss scale for fp16 that is logged and cannot collapse unnoticed."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_memopt.models.fake import is_fake
from lightning_memopt.precision.loss_scale import LossScale
from lightning_memopt.precision.names import DTYPES, check_name


class MixedPrecision(LightningMixedPrecision):
    """Weights in float32, matrix products in 16 bits by autocast; for fp16 a dynamic loss scale.

    The loss scale works on CPU and CUDA, with accumulation, clipping (gradients are unscaled first), several
    optimizers and manual optimization. Each update logs ``precision/loss_scale`` and ``precision/skipped_steps``. A
    skipped step counts as a step for ``trainer.global_step`` and learning-rate schedules, as in Lightning. The scale
    is saved in checkpoints and resumed.

    Args:
        dtype: ``"bf16"`` or ``"fp16"``.
        initial_scale: The first loss scale of fp16.
        growth_interval: Steps without overflow after which the scale doubles.

    Raises:
        MisconfigurationException: Unknown dtype, a scale or interval that is not positive, LBFGS with fp16, or
            trained weights that are stored in float16.
        LossScaleCollapsedError: In training, when lowering the scale does not make gradients finite.

    Source:
        Micikevicius et al. 2018 (https://arxiv.org/abs/1710.03740).

    Example:
        >>> trainer = pl.Trainer(plugins=[MixedPrecision("bf16")], logger=False)
    """

    def __init__(
        self, dtype: Literal["bf16", "fp16"], *, initial_scale: float = 2.0**16, growth_interval: int = 2000
    ) -> None:
        check_name("MixedPrecision", "dtype", dtype, DTYPES)
        if not _is_number(initial_scale, int | float) or not 0 < initial_scale < math.inf:
            raise MisconfigurationException(
                f"MixedPrecision(initial_scale={initial_scale!r}) cannot scale a loss; give a finite number above 0."
            )
        if not _is_number(growth_interval, int) or growth_interval < 1:
            raise MisconfigurationException(
                f"MixedPrecision(growth_interval={growth_interval!r}) is no number of steps; give a whole number of "
                "at least 1."
            )
        self._dtype = DTYPES[dtype]
        self._scale_options = {"init_scale": initial_scale, "growth_interval": growth_interval}
        self.loss_scale: LossScale | None = None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__("16-mixed" if dtype == "fp16" else "bf16-mixed", device)
        self._use_device(device)

    def _use_device(self, device: str) -> None:
        self.device = device
        if self._dtype == torch.float16:
            self.loss_scale = LossScale(device, **self._scale_options)
            self.scaler = self.loss_scale.scaler

    @override
    def connect(
        self, model: torch.nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[torch.nn.Module, list[Optimizer], list[Any]]:
        parameter = next((p for p in model.parameters() if not p.is_meta), None)  # not one that other ranks hold
        if parameter is not None and parameter.device.type != self.device:
            self._use_device(parameter.device.type)
        if self.loss_scale is not None:
            _refuse_lbfgs(optimizers)
        _refuse_trained_float16(model)
        if self.device == "cpu":
            _refuse_lstm_where_autocast_fails(model, self._dtype)
        return super().connect(model, optimizers, lr_schedulers)

    @override
    def pre_backward(  # type: ignore[override]
        self, tensor: torch.Tensor, module: "pl.LightningModule"
    ) -> torch.Tensor:
        if self.loss_scale is not None and not is_fake(tensor):
            tensor = self.loss_scale.scale(tensor)
        return Precision.pre_backward(self, tensor, module)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: "pl.LightningModule", closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if self.loss_scale is None:
            return Precision.optimizer_step(self, optimizer, model=model, closure=closure, **kwargs)
        result = closure()
        gradient = next(
            (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None), None
        )
        if gradient is None and result is None and model.automatic_optimization:
            return result  # the step returned None, and no earlier batch of its window left a gradient
        # On fake tensors nothing overflows, and the scaler's question whether something did has no answer.
        if gradient is None or is_fake(gradient):
            self._after_closure(model, optimizer)
            optimizer.step(**kwargs)
            return result
        self.loss_scale.scaler.unscale_(optimizer)
        self.loss_scale.check(model)
        self._after_closure(model, optimizer)
        self.loss_scale.step(optimizer, **kwargs)
        model.log_dict(
            {
                "precision/loss_scale": self.loss_scale.value,
                "precision/skipped_steps": float(self.loss_scale.skipped_steps),
            }
        )
        return result

    @override
    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        # Lightning refuses fused optimizers here, which may unscale inside their step; ours is unscaled before.
        Precision.clip_gradients(self, optimizer, *args, **kwargs)

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        with torch.autocast(self.device, dtype=self._dtype, cache_enabled=False):
            yield

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.loss_scale is None else self.loss_scale.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state_dict)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _refuse_lbfgs(optimizers: list[Optimizer]) -> None:
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            "MixedPrecision('fp16') cannot train with LBFGS: it computes the loss several times in a step, and an "
            "overflow in between cannot be undone; use MixedPrecision('bf16'), which needs no loss scale."
        )


def _refuse_trained_float16(model: torch.nn.Module) -> None:
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if trained:
        others = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        raise MisconfigurationException(
            f"MixedPrecision trains weights in float32, and `{trained[0]}`{others} is stored in float16, where small "
            "updates vanish and Adam divides by an epsilon that is 0. Call `.float()` on it, freeze it, or train in "
            "16 bits on purpose with HalfPrecision."
        )


def _refuse_lstm_where_autocast_fails(model: torch.nn.Module, dtype: torch.dtype) -> None:
    name = next((name for name, module in model.named_modules() if isinstance(module, torch.nn.LSTM)), None)
    if name is None:
        return
    try:
        # Real tensors, also in a prediction, whose fakes run anything.
        with unset_fake_temporarily(), torch.autocast("cpu", dtype=dtype):
            torch.nn.LSTM(8, 8)(torch.zeros(1, 1, 8))
    except RuntimeError as error:
        asked = next(known for known, of in DTYPES.items() if of == dtype)
        raise MisconfigurationException(
            f"MixedPrecision({asked!r}): {name} is an nn.LSTM, which CPU autocast to {asked} cannot run on this "
            f"processor (PyTorch says {str(error)!r}); train in float32."
        ) from error
