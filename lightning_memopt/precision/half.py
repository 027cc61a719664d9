"""Weights, gradients and activations in 16 bits, with updates that are not lost in rounding."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.precision.names import DTYPES, check_name
from lightning_memopt.techniques.batches import mapped
from lightning_memopt.techniques.half_storage import HalfStorage, find_unmatched
from lightning_memopt.techniques.per_parameter import check_steps_alone
from lightning_memopt.techniques.rounding import ROUNDINGS, RandomBits, RoundedUpdates, Rounding

KEPT_BY_DEFAULT = ("norm", "rotary")
"""Norms, whose weights are few and near 1, and rotary embeddings, whose angles need more than 8 bits."""


class HalfPrecision(Precision):
    """Parameters, gradients and activations stored in 16 bits, without float32 copies of the weights.

    Each parameter is stepped in float32 by the user's own optimizer and rounded back; the optimizer's state is
    float32. Inputs are cast to 16 bits. After ``fit`` the module has the types that the user gave it, with values
    that fit in 16 bits; so it has after ``validate``, ``test`` and ``predict`` alone, which with Lightning's own
    ``"bf16-true"`` round the module's weights for good too. A checkpoint loads into a plain module. Rounding's random
    numbers are saved and resumed.

    Args:
        dtype: ``"bf16"``, or ``"fp16"`` without a loss scale: gradients below 6e-8 vanish.
        rounding: How an updated weight is brought back to 16 bits: ``"stochastic"`` (bf16 only), ``"kahan"`` (2 bytes
            more for each parameter) or ``"nearest"``, which loses updates smaller than 1/512 of a weight.
        keep_fp32: What stays in float32 throughout: words in the classes of modules without submodules, or patterns
            of qualified names. See :class:`~lightning_memopt.techniques.half_storage.HalfStorage`.

    Raises:
        MisconfigurationException: Unknown names, fp16 with stochastic rounding; at the start of ``fit``, an entry of
            ``keep_fp32`` that names nothing, a tied weight of which only one side is kept, or an optimizer that
            cannot step one parameter at a time.

    Source:
        Zamirai et al. 2020 (https://arxiv.org/abs/2010.06192) for both remedies, stochastic and Kahan.

    Example:
        >>> trainer = pl.Trainer(plugins=[HalfPrecision("bf16", rounding="kahan")], logger=False)
    """

    def __init__(
        self,
        dtype: Literal["bf16", "fp16"] = "bf16",
        *,
        rounding: Rounding = "stochastic",
        keep_fp32: Sequence[str] = KEPT_BY_DEFAULT,
    ) -> None:
        check_name("HalfPrecision", "dtype", dtype, DTYPES)
        check_name("HalfPrecision", "rounding", rounding, ROUNDINGS)
        if dtype == "fp16" and rounding == "stochastic":
            raise MisconfigurationException(
                "HalfPrecision('fp16', rounding='stochastic') is not possible: it is bfloat16 that is a cut float32, "
                "and fp16's trouble is gradients that underflow, not weights that are rounded. Use 'bf16', "
                "rounding='kahan', or MixedPrecision('fp16'), which scales the loss."
            )
        is_sequence = isinstance(keep_fp32, Sequence) and not isinstance(keep_fp32, str)
        if not is_sequence or not all(isinstance(entry, str) and entry for entry in keep_fp32):
            raise MisconfigurationException(
                f"HalfPrecision(keep_fp32={keep_fp32!r}) must be a sequence of names, such as ('norm', 'model.head')."
            )
        self.precision = "bf16-true" if dtype == "bf16" else "16-true"
        self._dtype = DTYPES[dtype]
        self._rounding: Rounding = rounding
        self._keep_fp32 = tuple(keep_fp32)
        self._bits: RandomBits | None = None
        self._storage: HalfStorage | None = None
        self._updates: list[RoundedUpdates] = []

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        if self._storage is not None:  # a fit that was interrupted before its teardown
            self.teardown()
        chosen = [entry for entry in self._keep_fp32 if entry not in KEPT_BY_DEFAULT]
        if unmatched := find_unmatched(module, chosen):
            names = [name for name, _ in module.named_modules()][1:6]
            raise MisconfigurationException(
                f"HalfPrecision(keep_fp32=...): {unmatched} name no submodule of {type(module).__name__}; possible "
                f"are words in the class names of its layers, or patterns of names such as {names}."
            )
        try:
            self._storage = HalfStorage(module, self._dtype, self._keep_fp32)
        except ValueError as error:
            raise MisconfigurationException(f"HalfPrecision: {error}") from error
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        if self._rounding == "stochastic" and optimizers and self._bits is None:
            seed = torch.initial_seed()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                seeds = [seed]
                torch.distributed.broadcast_object_list(seeds)
                seed = seeds[0]
            self._bits = RandomBits(seed)
        for optimizer in optimizers:
            _check_steps_alone(optimizer)
            self._updates.append(RoundedUpdates(optimizer, self._rounding, self._bits))
        return super().connect(model, optimizers, lr_schedulers)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: "pl.LightningModule", closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        # The closure first: parameters are stepped in a hook before the optimizer's step, and need their gradients.
        result = self._wrap_closure(model, optimizer, closure)
        optimizer.step(**kwargs)
        return result

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Make 16 bits the default type, for tensors that the module's ``forward`` creates."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

    @override
    def convert_input(self, data: Any) -> Any:
        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

        return mapped(data, cast)  # Lightning's own refuses frozen dataclasses

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._bits is None else {"random_bits": self._bits.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._bits is not None and "random_bits" in state_dict:
            self._bits.load_state_dict(state_dict["random_bits"])

    @override
    def teardown(self) -> None:
        for updates in self._updates:
            updates.remove()
        self._updates.clear()
        if self._storage is not None:
            self._storage.remove()
            self._storage = None


def _check_steps_alone(optimizer: Optimizer) -> None:
    try:
        check_steps_alone(optimizer)
    except ValueError as error:
        raise MisconfigurationException(
            f"HalfPrecision steps parameters one at a time in float32: {error}"
        ) from error
