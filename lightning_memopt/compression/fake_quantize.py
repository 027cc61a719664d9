"""Train with the rounding that quantization will do: forward as if packed, backward as if not."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_memopt.compression.packed.base import attends_to_itself
from lightning_memopt.compression.packed.integers import Inputs, round_inputs
from lightning_memopt.compression.quantize import Scheme, pack_weight, packing, why_not
from lightning_memopt.compression.ranges import Range, input_range, sample_dims
from lightning_memopt.compression.selection import Weight, WeightFilter
from lightning_memopt.models.compiled import compile_anew, is_compiled
from lightning_memopt.models.fake import is_fake
from lightning_memopt.models.in_backward import is_in_backward

MOMENTUM = 0.05
"""Share of the newest batch in the moving average of a range."""


class FakeQuantization:
    """Rounds weights, and inputs where the scheme does, whenever their layers run, until :meth:`remove`.

    The rounded weight is put before the parameter for as long as its layer's ``forward`` runs, so that parameter
    names, ``state_dict`` and optimizer stay as they are. Gradients pass the rounding unchanged (the straight-through
    estimator, https://arxiv.org/abs/1308.3432). The grid is that of
    :func:`~lightning_memopt.compression.quantize.quantize`: what is trained is what comes out.

    Args:
        module: The module that trains.
        scheme: As for :func:`~lightning_memopt.compression.quantize.quantize`.
        which: Which weights; ``None``: all, embeddings too.

    Attributes:
        enabled: Whether anything is rounded now; :meth:`set` changes it.
        observing: Whether the ranges of ``"int8_static"`` follow the inputs, as moving averages of the smallest and
            the largest of each training batch; likewise.
        ranges: By name of a layer, these two.

    Raises:
        ValueError: The scheme is unknown, or no weight is left.
    """

    def __init__(
        self,
        module: nn.Module,
        scheme: Scheme,
        which: WeightFilter | None = None,
        ranges: Mapping[str, Range] | None = None,
    ) -> None:
        self._module = module
        self.enabled = self.observing = True
        self.ranges = dict(ranges or {})
        self._scheme = scheme
        self._inputs = packing(scheme)[1].get("inputs") if scheme != "int8_static" else "static"
        self._handles: list[RemovableHandle] = []
        self._waiting: dict[str, list[str]] = {}
        # What shadows a parameter has to be gone before anything else reads it, so each layer takes its own away.
        carriers: dict[nn.Module, list[tuple[nn.Module, str, Weight]]] = {}
        names: dict[nn.Module, str] = {}
        for weight in (which or WeightFilter(embeddings=True)).select(module).weights:
            if why_not(weight):
                continue
            for name in (weight.name, *weight.tied):
                owner, _, key = name.rpartition(".")
                carrier, part = _carrier(module, owner)
                carriers.setdefault(carrier, []).append((part, key, weight))
                names[carrier] = owner if carrier is part else owner.rpartition(".")[0]
        for carrier, shadows in carriers.items():
            self._hook(names[carrier], carrier, shadows)
        compile_anew(module)

    @property
    def unreached(self) -> list[str]:
        """Weights whose layers were not called so far; none of a module that is compiled, where that is not seen."""
        return [] if is_compiled(self._module) else [name for names in self._waiting.values() for name in names]

    def set(self, *, enabled: bool, observing: bool) -> None:
        """Say whether to round from now on, and whether to follow the inputs."""
        if (enabled, observing) != (self.enabled, self.observing):
            self.enabled, self.observing = enabled, observing
            compile_anew(self._module)

    def remove(self) -> None:
        """Take the rounding away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        compile_anew(self._module)

    def _hook(self, name: str, carrier: nn.Module, shadows: list[tuple[nn.Module, str, Weight]]) -> None:
        # Of attention the inputs are rounded; what goes into its last projection is within, and is not.
        is_attention = isinstance(carrier, nn.MultiheadAttention)
        dims = None if self._inputs is None else (-1,) if is_attention else sample_dims(carrier)

        self._waiting[name] = [weight.name for _, _, weight in shadows]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not torch.compiler.is_compiling():
                self._waiting.pop(name, None)
            x: Any = args[0] if args else next(iter(kwargs.values()), None)
            is_rounded = isinstance(x, Tensor) and (not is_attention or attends_to_itself(*args, **kwargs))
            if dims is not None and is_rounded and self.observing and carrier.training:
                self._observe(name, x)
            if not self.enabled:
                return None
            for part, key, weight in shadows:
                vars(part)[key] = self._round_weight(part._parameters[key], weight)
            if dims is None or not is_rounded or (self._inputs == "static" and name not in self.ranges):
                return None
            known = self.ranges[name] if self._inputs == "static" else "dynamic"
            rounded = _round_inputs(x, known, dims)
            named = {key: rounded if given is x else given for key, given in kwargs.items()}
            return tuple(rounded if given is x else given for given in args), named

        def after(*_: Any) -> None:
            for part, key, _weight in shadows:
                vars(part).pop(key, None)

        self._handles.append(carrier.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(carrier.register_forward_hook(after, always_call=True))

    def _round_weight(self, parameter: Any, weight: Weight) -> Tensor:
        with torch.no_grad():
            rounded = pack_weight(parameter, weight, self._scheme).dequantize()
        return parameter + (rounded - parameter).detach()

    def _observe(self, name: str, x: Tensor) -> None:
        if is_in_backward():  # a checkpointed block computes again what was observed
            return
        if self._inputs == "static" and x.numel():
            low, high = (0.0, 1.0) if is_fake(x) else input_range(x)  # fake: only sizes are asked for
            if 0 < high - low < float("inf"):
                old_low, old_high = self.ranges.get(name, (low, high))
                self.ranges[name] = low + (1 - MOMENTUM) * (old_low - low), high + (1 - MOMENTUM) * (old_high - high)


def _carrier(module: nn.Module, owner: str) -> tuple[nn.Module, nn.Module]:
    """The module whose ``forward`` reads the weights of ``owner``, and that module itself."""
    part = module.get_submodule(owner)
    parent = module.get_submodule(owner.rpartition(".")[0])
    return (parent if isinstance(parent, nn.MultiheadAttention) else part), part


def _round_inputs(x: Tensor, inputs: Inputs, dims: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        integers, step, _zero = round_inputs(x, inputs, dims)
        rounded = (integers * step).to(x.dtype)
        inside = (x.abs() <= rounded.abs() + 0.51 * step).to(x.dtype)  # what is cut off does not learn
    return x * inside + (rounded - x * inside).detach()
