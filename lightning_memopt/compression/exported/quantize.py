"""Quantize by export what exports, and pack the rest."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from lightning_memopt.compression.exported.calls import Calls, Inputs, record_calls
from lightning_memopt.compression.exported.graph import convert, export_observed, read_ranges, unrounded
from lightning_memopt.compression.exported.module import ExportedModule
from lightning_memopt.compression.finite import check_materialized, why_not_finite
from lightning_memopt.compression.quantize import GrowthError, Quantized, module_bytes, quantize
from lightning_memopt.compression.ranges import Range, observe_inputs
from lightning_memopt.compression.selection import Kind, Selection, Weight, WeightFilter, find_weights
from lightning_memopt.models.weight_reads import find_weight_reads

_READ_THEIR_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Classes of torch's whose code reads the weights of their submodules."""

_UNKNOWN: tuple[Kind, ...] = ("conv1d", "embedding", "experts", "recurrent")
"""Kinds of weights that PT2E's quantizer leaves as they are."""


def quantize_exported(
    module: nn.Module,
    calibrate: Callable[[], Any],
    which: WeightFilter | None = None,
    *,
    check: Callable[[], Any] | None = None,
    agree: Callable[[Any], Any] = lambda value: value,
) -> Quantized:
    """Replace parts of ``module``, in place, by exported graphs of integers, and pack the weights of the others.

    A part is the outermost submodule below ``module`` whose calls export with their batch size left open, and in
    which torchao's quantizer for Inductor on x86 (PT2E) rounds every weight that is meant. Where none is found on the
    way from ``module`` to a layer, the layer's weight is packed as ``quantize(module, "int8_static")`` packs it, and
    ``fallbacks`` of the result says why.

    Args:
        module: A trained module; afterwards in evaluation mode, in which it stays.
        calibrate: Runs ``module`` on batches, in evaluation mode; called twice.
        which: Which weights; ``None``: all, embeddings too.
        check: Runs it as it will be run; where that fails, nothing stays exported. ``None``: ``calibrate``.
        agree: Makes the same of values that each rank has its own of, as by a broadcast.

    Raises:
        ValueError: A weight is on the meta device, or nothing became smaller
            (:class:`~lightning_memopt.compression.quantize.GrowthError`).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), nn.Softmax(-1))
        >>> done = quantize_exported(net, lambda: net(torch.randn(8, 64)))
        >>> type(net[0]).__name__, done.packed, done.fallbacks
        ('ExportedModule', ['0.0.weight', '0.2.weight'], {})
    """
    which = which or WeightFilter(embeddings=True)
    selection = which.select(module)
    check_materialized((weight.name, weight.parameter) for weight in selection.weights)
    module.eval()
    before = module_bytes(module)
    with record_calls(module) as calls, observe_inputs(module) as ranges:
        calibrate()
    calls, ranges = agree(calls), agree(ranges)
    plan = _Plan(module, calls, selection)
    plan.choose("", module)
    plan.convert(calibrate, check or calibrate, agree)
    names = [name for weight in plan.exported for name in (weight.name, *weight.tied)]
    rest = [weight.name for weight in selection.weights if weight.name not in names]
    done = _pack(module, rest, ranges) if names else quantize(module, "int8_static", which, ranges)
    skipped = selection.skipped | {name: done.skipped[name] for name in rest if name in done.skipped}
    fallbacks = {
        name: "; ".join(filter(None, [f"packed and not exported: {plan.reasons[name]}", done.fallbacks.get(name)]))
        for name in rest
        if name not in skipped
    }
    return Quantized([*names, *done.packed], skipped, fallbacks, before, module_bytes(module))


@dataclass(frozen=True)
class _Part:
    """A submodule that exports: itself, its graph with observers, and its weights."""

    source: nn.Module
    observed: GraphModule
    inputs: Inputs
    weights: list[Weight]


class _Plan:
    """Which submodules are exported, and why weights are in none.

    Attributes:
        parts: What is exported, by name.
        reasons: By name of a weight that is in no such part.
    """

    def __init__(self, module: nn.Module, calls: Mapping[str, Calls], selection: Selection) -> None:
        self._module, self._calls, self._weights = module, calls, selection.weights
        meant = {weight.name for weight in selection.weights}
        self._unmeant = [weight.name for weight in find_weights(module) if weight.name not in meant]
        self._read = find_weight_reads(module, any_use=True)
        self.parts: dict[str, _Part] = {}
        self.reasons: dict[str, str] = {}

    @property
    def exported(self) -> list[Weight]:
        """Weights in exported parts."""
        return [weight for part in self.parts.values() for weight in part.weights]

    def choose(self, name: str, module: nn.Module) -> None:
        """Find the outermost parts in ``module`` that export, and say of the weights that are in none why."""
        weights = [weight for weight in self._weights if _is_in(weight.name, name)]
        if not weights:
            return
        reason = self._why_whole(name, module, weights) or self._export(name, module, weights)
        if not reason:
            return
        self.reasons |= {weight.name: reason for weight in weights}
        if not isinstance(module, _READ_THEIR_PARTS):
            for key, child in module.named_children():
                self.choose(f"{name}.{key}" if name else key, child)

    def convert(self, calibrate: Callable[[], Any], check: Callable[[], Any], agree: Callable[[Any], Any]) -> None:
        """Put graphs of integers in the place of the parts, as far as they run and are smaller."""
        if not self.parts:
            return
        try:
            for name, part in self.parts.items():
                self._put(name, ExportedModule(part.observed, part.source, part.inputs))
            calibrate()
            ranges = agree({name: read_ranges(part.observed) for name, part in self.parts.items()})
            for name, part in list(self.parts.items()):
                if reason := self._convert(name, part, ranges[name]):
                    self._restore(name, reason)
            check()
        except Exception as error:  # of the user's code, which may read what a graph has not, or of torch's
            for name in list(self.parts):
                self._restore(name, f"what was exported does not run as the module does ({_first_line(error)})")
        for part in self.parts.values():
            part.source.to("meta")

    def _why_whole(self, name: str, module: nn.Module, weights: list[Weight]) -> str:
        """Why ``module`` cannot be one part, as far as that is known without exporting it; empty where it may."""
        kind, call = type(module).__name__, self._calls.get(name)
        unknown = next((type(weight.module).__name__ for weight in weights if weight.kind in _UNKNOWN), "")
        if unknown:
            return f"PT2E's quantizer does not know {unknown}"
        if not name:
            return f"{kind} is the module itself, and stays"
        if call is None:
            return f"calibration saw no call of {kind}"
        if call.reason:
            return f"{kind} has calls that one graph cannot take: {call.reason}"
        if call.computes_loss:
            return f"{kind} computes a loss, so that it may be called without targets too"
        if any(_is_in(weight, name) for weight in self._unmeant):
            return f"{kind} has weights that are not to be quantized"
        if any(
            _is_in(part, name) and part != name and name not in calls.within for part, calls in self._calls.items()
        ):
            return f"parts of {kind} are called by themselves"
        if _is_shared(self._module, name, module):
            return f"{kind} shares parameters or parts with others"
        if any(why_not_finite(weight.parameter) for weight in weights):
            return f"{kind} has weights with NaN or infinite elements"
        inside = {f"{name}.{key}" for key in find_weight_reads(module, any_use=True)}
        if any(_is_in(read, name) and read not in inside for read in self._read):
            return f"weights of {kind} are read by code outside of it"
        if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
            return f"{kind} has hooks, which a graph would not run"
        if any("forward" in vars(part) for part in module.modules()):
            return f"the forward of {kind} is replaced on the instance"
        return ""

    def _export(self, name: str, module: nn.Module, weights: list[Weight]) -> str:
        """Add ``module`` to the parts, or say why it is none."""
        kind, call = type(module).__name__, self._calls[name]
        try:
            observed, sizes = export_observed(module, call.inputs)
        except Exception as error:  # of whatever in the module cannot be traced
            return f"{kind} does not export ({_first_line(error)})"
        is_fixed = any(size[0] not in (None, 1) for size in sizes if size)
        if is_fixed or any(sizes[index][dim] is not None for index, dim in call.varying):
            return f"{kind} exports for one size of a batch only"
        if unrounded(observed, [weight.parameter for weight in weights]):
            return f"PT2E's quantizer leaves weights of {kind} as they are"
        self.parts[name] = _Part(module, observed, call.inputs, weights)
        return ""

    def _convert(self, name: str, part: _Part, ranges: Mapping[str, Range]) -> str:
        """Put the graph of integers in the place of ``part``, or say why not."""
        kind = type(part.source).__name__
        if any(not math.isfinite(high - low) for low, high in ranges.values()):
            return f"calibration saw no inputs of {kind}, or infinite ones"
        exported = ExportedModule(convert(part.observed, ranges), part.source, part.inputs, ranges)
        new, old = module_bytes(exported), module_bytes(part.source)
        if new >= old:
            return f"{kind} would take {new} bytes instead of {old}"
        self._put(name, exported)
        return ""

    def _put(self, name: str, module: nn.Module) -> None:
        owner, _, key = name.rpartition(".")
        self._module.get_submodule(owner)._modules[key] = module

    def _restore(self, name: str, reason: str) -> None:
        part = self.parts.pop(name)
        self._put(name, part.source)
        self.reasons |= {weight.name: reason for weight in part.weights}


def _pack(module: nn.Module, names: list[str], ranges: Mapping[str, Range]) -> Quantized:
    """Pack the weights of these ``names``, which may all stay whole where others are exported."""
    if not names:
        return Quantized()
    try:
        return quantize(module, "int8_static", WeightFilter(include=names, embeddings=True), ranges)
    except GrowthError as error:
        return Quantized(skipped=error.skipped)


def _is_in(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(f"{owner}.")


def _is_shared(root: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether anything of ``module`` is registered outside of it too."""
    own = {id(held) for held in (*module.modules(), *module.parameters(), *module.buffers())}
    every = (
        root.named_modules(remove_duplicate=False), root.named_parameters(remove_duplicate=False),
        root.named_buffers(remove_duplicate=False),
    )  # fmt: skip
    return any(id(held) in own and not _is_in(other, name) for named in every for other, held in named)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
