"""Hold the weights of a module in few bits."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_memopt.compression.finite import check_materialized, why_not_finite
from lightning_memopt.compression.packed import (
    Float8Weight,
    HalfWeight,
    Int4Weight,
    Int8Weight,
    NF4Weight,
    PackedWeight,
    TorchaoWeight,
    stored_bytes,
)  # fmt: skip
from lightning_memopt.compression.packed.by_torchao import GROUP, TORCHAO_SCHEMES, import_torchao
from lightning_memopt.compression.placing import order_weights, replace_weight
from lightning_memopt.compression.ranges import Range, joined, sample_dims
from lightning_memopt.compression.selection import Weight, WeightFilter
from lightning_memopt.models.fake import is_fake

Scheme = Literal[
    "int8", "int8_weight_only", "int8_dynamic", "int8_static", "int4_weight_only", "nf4", "fp16", "bf16", "fp8"
]

Engine = Literal["memopt", "torchao"]

_PACKINGS: dict[str, tuple[type[PackedWeight], dict[str, Any]]] = {
    "int8_weight_only": (Int8Weight, {}),
    "int8_dynamic": (Int8Weight, {"inputs": "dynamic"}),
    "int8_static": (Int8Weight, {}),  # with the range of each layer's inputs, once it is known
    "int4_weight_only": (Int4Weight, {}),
    "nf4": (NF4Weight, {}),
    "fp8": (Float8Weight, {}),
    "fp16": (HalfWeight, {"kind": "fp16"}),
    "bf16": (HalfWeight, {"kind": "bf16"}),
}


CLUSTERS = 256
"""A weight of no more distinct values, each of four elements or more on average, is taken to be clustered."""


class GrowthError(ValueError):
    """Nothing that a module holds becomes smaller.

    Attributes:
        skipped: By name of a parameter, why it does not.
    """

    def __init__(self, message: str, skipped: Mapping[str, str]) -> None:
        super().__init__(message)
        self.skipped = dict(skipped)


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` did.

    Attributes:
        packed: Names of the parameters that are packed now, tied ones by each name.
        skipped: Of every other parameter, why it is as it was.
        fallbacks: Of packed weights, or their inputs, that are not rounded as was asked for, what is done instead and
            why.
        bytes_before: Bytes of the module's parameters and buffers before.
        bytes_after: And now.
    """

    packed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0


@torch.inference_mode(mode=False)  # within which packed weights would be of no use outside
def quantize(
    module: nn.Module,
    scheme: Scheme = "int8_weight_only",
    which: WeightFilter | None = None,
    input_ranges: Mapping[str, Range] | None = None,
    *,
    engine: Engine = "memopt",
) -> Quantized:
    """Pack the weights of ``module``, in place, where that makes them smaller.

    Linear layers, Hugging Face's ``Conv1D``, convolutions, embeddings, experts stacked in one parameter and the
    projections of ``nn.MultiheadAttention`` are packed; ties stay ties. Biases, norms and recurrent layers stay as
    they are, and so, with a warning, do weights with NaN or infinite elements.

    Args:
        module: A trained module. It can predict afterwards, not train.
        scheme: ``"int8_weight_only"`` (``"int8"``), ``"int4_weight_only"``, ``"nf4"``, ``"fp8"``, ``"fp16"`` and
            ``"bf16"`` store weights so and compute in the type of the inputs; ``"int8_dynamic"`` and
            ``"int8_static"`` round the inputs of linear layers, 2-d convolutions and self-attention too and multiply
            integers.
        which: Which weights; ``None``: all, embeddings too.
        input_ranges: For ``"int8_static"``: by name of a module, the smallest and the largest of its inputs
            (:func:`~lightning_memopt.compression.ranges.observe_inputs`).
        engine: ``"torchao"`` has torchao hold and multiply the weights of linear maps, for its kernels on GPUs. Other
            weights, which it does not take, are packed as without it, and ``fallbacks`` names them.

    Raises:
        ValueError: The scheme is unknown, or torchao has no kernels for it where the weights are; a weight is on the
            meta device; or nothing became smaller (:class:`GrowthError`).
        ImportError: bitsandbytes, for nf4, or torchao is needed and missing.

    Example:
        >>> net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> done = quantize(net, "int8")
        >>> done.packed, done.bytes_after < 0.27 * done.bytes_before
        (['0.weight', '2.weight'], True)
    """
    packing(scheme, engine)
    selection = (which or WeightFilter(embeddings=True)).select(module)
    check_materialized((weight.name, weight.parameter) for weight in selection.weights)
    skipped, names, before = dict(selection.skipped), [], module_bytes(module)
    fallbacks: dict[str, str] = {}
    for weight in selection.weights:
        reason = why_not(weight)
        if not reason and (reason := why_not_finite(weight.parameter)):
            warnings.warn(f"{weight.name!r} {reason}, so it is left as it is, unquantized.", stacklevel=2)
        if not reason:
            found = _range_of(weight, input_ranges or {})
            packed = pack_weight(weight.parameter, weight, scheme, found, engine)
            reason = _too_large(packed, weight)
            if not reason:
                replace_weight(module, weight, packed)
                names += [weight.name, *weight.tied]
                if fallback := _fallback(weight, scheme, found, engine):
                    fallbacks[weight.name] = fallback
                continue
        skipped[weight.name] = reason
    if not names:
        raise _growth(module, scheme, skipped)
    order_weights(module)
    return Quantized(names, skipped, fallbacks, before, module_bytes(module))


def check_hardware(scheme: Scheme, engine: Engine, device: torch.device) -> None:
    """Raise where ``engine`` has no kernels for ``scheme`` on ``device``; ours compute everywhere.

    Raises:
        ValueError: Says what it lacks.
    """
    if engine == "torchao":
        TorchaoWeight.pack(torch.zeros(GROUP, GROUP, device=device), scheme=_full_name(scheme))


def check_quantizable(
    module: nn.Module,
    scheme: Scheme,
    which: WeightFilter,
    engine: Engine = "memopt",
    device: torch.device | None = None,
) -> None:
    """Raise what :func:`quantize` would, without changing anything; quick, and sizes alone matter.

    Args:
        module: A module.
        scheme: See :func:`quantize`.
        which: Likewise.
        engine: Likewise.
        device: Where the module will be; ``None``: where it is.

    Raises:
        ValueError: No weight is selected, or none becomes smaller (:class:`GrowthError`).
    """
    skipped: dict[str, str] = {}
    for weight in which.select(module).weights:
        reason = why_not(weight)
        if not reason:
            like = weight.parameter if engine == "memopt" else torch.zeros_like(weight.parameter, device=device)
            reason = _too_large(pack_weight(like, weight, scheme, engine=engine), weight)
        if not reason:
            return
        skipped[weight.name] = reason
    raise _growth(module, scheme, skipped)


def packing(scheme: str, engine: str = "memopt") -> tuple[type[PackedWeight], dict[str, Any]]:
    """The class and the options that weights are packed with.

    Raises:
        ValueError: There is no such scheme or engine, or no such scheme of this engine.
        ImportError: bitsandbytes, for nf4, or torchao is needed and missing.
    """
    scheme = _full_name(scheme)
    found = _PACKINGS.get(scheme)
    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r} is not known; possible are {', '.join(map(repr, get_args(Engine)))}.")
    if found is None:
        raise ValueError(f"scheme={scheme!r} is not known; possible are {', '.join(map(repr, get_args(Scheme)))}.")
    if scheme == "nf4":
        NF4Weight.pack(torch.zeros(1, NF4Weight.BLOCK))  # says that bitsandbytes is missing, before hours of training
    if engine == "torchao":
        if scheme not in TORCHAO_SCHEMES:
            raise ValueError(
                f"scheme={scheme!r} is none of those that torchao holds weights by, which are "
                f"{', '.join(map(repr, TORCHAO_SCHEMES))}. Leave engine='torchao' out."
            )
        import_torchao()
    return found


def _full_name(scheme: str) -> str:
    return "int8_weight_only" if scheme == "int8" else scheme


def module_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of ``module``, tied ones once."""
    return sum(map(stored_bytes, {id(t): t for t in (*module.parameters(), *module.buffers())}.values()))


def pack_weight(
    parameter: Tensor, weight: Weight, scheme: Scheme, input_range: Range | None = None, engine: Engine = "memopt"
) -> PackedWeight:
    """Pack ``parameter`` as ``weight`` is to be: one scale for all of it where it is clustered, and stays so."""
    cls, options = packing(scheme, engine)
    if engine == "torchao" and not _why_not_torchao(weight, scheme):
        return TorchaoWeight.pack(parameter, weight.output_dim, scheme=_full_name(scheme))
    if scheme == "int8_static":
        options = {**options, "inputs": list(input_range) if input_range else "dynamic"}
    if cls is Int8Weight:
        # With a scale for each output, one value of a cluster would become as many as there are outputs.
        options = {**options, "whole": _is_clustered(parameter)}
    if weight.kind == "experts":  # each has scales of its own, and is multiplied by other means than linear layers
        return cls.pack(parameter, (0, weight.output_dim), **options | {"inputs": None})
    return cls.pack(parameter, weight.output_dim, **options)


def _is_clustered(parameter: Tensor) -> bool:
    if is_fake(parameter):
        parameter.detach().reshape(-1).sort()  # the memory of `unique`, whose result depends on values
        return False
    left = int(torch.count_nonzero(parameter))  # what is pruned shares a value, and need not be clustered
    distinct = len(torch.unique(parameter)) - int(left < parameter.numel())
    return distinct <= CLUSTERS and 4 * distinct <= left


def why_not(weight: Weight) -> str:
    """Why ``weight`` cannot be packed; empty where it can."""
    if weight.kind == "recurrent":
        return f"the fused kernel of {type(weight.module).__name__} reads dense weights only"
    if "forward" in vars(weight.module):
        return "its forward is replaced on the instance"
    return "" if weight.parameter.element_size() > 1 else f"is {weight.parameter.dtype} already"


def _fallback(weight: Weight, scheme: str, found: Range | None, engine: str) -> str:
    """What is done with ``weight``, or its inputs, instead of what was asked for; empty where it is that."""
    own = _own_fallback(weight, scheme, found)
    if engine == "memopt":
        return own
    reason = _why_not_torchao(weight, scheme)
    return "; ".join(filter(None, (f"packed by lightning_memopt: {reason}", own))) if reason else ""


def _why_not_torchao(weight: Weight, scheme: str) -> str:
    """Why torchao does not hold ``weight``; empty where it does."""
    if weight.kind not in ("linear", "conv1d", "attention"):
        # It would unpack all of an embedding for each look-up.
        return "torchao holds linear maps alone"
    if scheme == "int4_weight_only" and weight.parameter.shape[1 - weight.output_dim] % GROUP:
        return f"its inputs are no multiple of the {GROUP} that share a scale in torchao"
    return ""


def _own_fallback(weight: Weight, scheme: str, found: Range | None) -> str:
    if scheme not in ("int8_dynamic", "int8_static") or (weight.kind == "embedding" and not weight.tied):
        return ""
    if weight.kind == "experts":
        return "inputs are not rounded: experts, stacked in one parameter, are multiplied as floats"
    if weight.kind == "conv" and sample_dims(weight.module) is None:
        return "inputs are not rounded: integers are convolved in two dimensions, without groups, where it is quicker"
    if scheme == "int8_static" and found is None:
        return "each row of inputs is measured, as with int8_dynamic, since calibration saw none"
    return ""


def _too_large(packed: PackedWeight, weight: Weight) -> str:
    new, old = stored_bytes(packed), stored_bytes(weight.parameter)
    return f"would take {new} bytes instead of {old}" if new >= old else ""


def _growth(module: nn.Module, scheme: str, skipped: Mapping[str, str]) -> GrowthError:
    reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
    return GrowthError(
        f"{type(module).__name__} has {module_bytes(module):,} bytes and would have no fewer as {scheme}: nothing in "
        f"it becomes smaller ({reasons}). Leave it as it is.",
        skipped,
    )


def _range_of(weight: Weight, ranges: Mapping[str, Range]) -> Range | None:
    """Of all layers that have it; where calibration did not reach, each row of the inputs is measured."""
    found: Range | None = None
    for name in (weight.name, *weight.tied):
        if (owner := name.rpartition(".")[0]) in ranges:
            found = joined(found, ranges[owner])
    return found if found and found[0] < found[1] else None
