"""Choose which weights of a model may be compressed, and say of the others why not."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_memopt.models.experts import holds_experts, output_dim
from lightning_memopt.models.selectors import Selector, as_selectors, matches, show

_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
"""Weights of recurrent layers by name, and not what ``torch.nn.utils`` computes them from (``weight_hh_l0_g``)."""

Kind = Literal["linear", "conv", "conv1d", "attention", "recurrent", "experts", "embedding"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix (or stack of filters) that may be compressed.

    Attributes:
        name: Qualified name of the parameter; of a tied one the first.
        module_name: Qualified name of the module that holds it.
        module: That module.
        parameter: The weight itself.
        kind: What uses it: ``"linear"``, ``"conv"``, ``"conv1d"`` (Hugging Face's, stored inputs by outputs),
            ``"attention"`` (projections of ``nn.MultiheadAttention``), ``"recurrent"``, ``"experts"`` (a matrix for
            each expert, stacked in one parameter) or ``"embedding"``.
        output_dim: The dimension of the outputs; of an embedding, that of its rows.
        input_dim: The dimension of the inputs; of an embedding, that of its features.
        tied: The other names under which the parameter is registered.
    """

    name: str
    module_name: str
    module: nn.Module
    parameter: nn.Parameter
    kind: Kind
    output_dim: int = 0
    input_dim: int = 1
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What may be compressed.

    Attributes:
        weights: The weights, in the order of registration, tied ones once.
        skipped: Of every other parameter, by its name, why it is left as it is.
    """

    weights: list[Weight] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def select_weights(
    module: nn.Module,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    *,
    embeddings: bool = False,
) -> Selection:
    """Find the weights of linear, convolution, attention and recurrent layers, experts and, if asked, embeddings.

    Biases, norms and positions are few and sensitive, and are never chosen. A weight that is tied to an embedding is
    an embedding.

    Args:
        module: Any module; it is only read.
        include: Only these: qualified names or patterns of parameters or of modules (with all that is in them), or
            classes of modules. ``None``: all.
        exclude: Not these, even where ``include`` says so.
        embeddings: Choose embeddings too.

    Raises:
        ValueError: Something in ``include`` or ``exclude`` matches nothing, or no weight is left.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> [weight.name for weight in select_weights(net, exclude="2").weights]
        ['0.weight']
    """
    included = None if include is None else as_selectors(include, "include")
    excluded = [] if exclude is None else as_selectors(exclude, "exclude")
    places = _find_places(module)
    _refuse_unmatched(module, places.values(), included or [], "include")
    _refuse_unmatched(module, places.values(), excluded, "exclude")
    selection = Selection()
    for parameter, held in places.items():
        weight, reason = _read(parameter, held)
        if included is not None and not _any_matches(held, included):
            reason = "not in include"
        elif _any_matches(held, excluded):
            reason = "in exclude"
        elif weight is not None and weight.kind == "embedding" and not embeddings:
            reason = "an embedding, or tied to one; compressed on request only (embeddings=True)"
        elif weight is not None:
            selection.weights.append(weight)
            continue
        selection.skipped[held[0].name] = reason
    if not selection.weights:
        raise ValueError(_nothing_left(module, selection.skipped, included))
    return selection


@dataclass(frozen=True)
class WeightFilter:
    """What :func:`select_weights` is asked, checked before there is a module to ask it of.

    Attributes:
        include: See :func:`select_weights`.
        exclude: Likewise.
        embeddings: Likewise.

    Raises:
        ValueError: One of them can mean no module.
    """

    include: Selector | Sequence[Selector] | None = None
    exclude: Selector | Sequence[Selector] | None = None
    embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in (("include", self.include), ("exclude", self.exclude)):
            if value is not None:
                as_selectors(value, name)

    def select(self, module: nn.Module) -> Selection:
        """The weights of ``module`` that are meant."""
        return select_weights(module, self.include, self.exclude, embeddings=self.embeddings)


def is_compressed(parameter: Tensor) -> bool:
    """Whether ``parameter`` stands for numbers that it does not hold: quantized by whatever library."""
    is_wrapper = is_traceable_wrapper_subclass(parameter) and not isinstance(parameter, DTensor)
    return is_wrapper or not parameter.is_floating_point()


@dataclass(frozen=True)
class _Place:
    """Where a parameter is registered: its name, its owner, and the modules around it from the root inward."""

    name: str
    path: tuple[tuple[str, nn.Module], ...]

    @property
    def owner(self) -> nn.Module:
        return self.path[-1][1]

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]


def _find_places(root: nn.Module) -> dict[nn.Parameter, list[_Place]]:
    modules = dict(root.named_modules(remove_duplicate=False))
    places: dict[nn.Parameter, list[_Place]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        parts = name.split(".")[:-1]
        prefixes = [".".join(parts[:length]) for length in range(len(parts) + 1)]
        places.setdefault(parameter, []).append(_Place(name, tuple((p, modules[p]) for p in prefixes)))
    return places


def find_weights(module: nn.Module) -> list[Weight]:
    """All that is a weight by where it is, compressed or not."""
    found = (_as_weight(parameter, held) for parameter, held in _find_places(module).items())
    return [weight for weight in found if weight is not None]


def _read(parameter: nn.Parameter, held: list[_Place]) -> tuple[Weight | None, str]:
    """The weight that ``parameter`` is, or why it is none."""
    if is_lazy(parameter):
        return None, f"{type(held[0].owner).__name__} has not seen its first batch, so its shape is not known"
    if not parameter.numel():
        return None, "empty"
    if is_compressed(parameter):
        return None, f"a {type(parameter).__name__} of {parameter.dtype}, so it is compressed already"
    weight = _as_weight(parameter, held)
    return weight, "" if weight else _why_not(parameter, held[0])


def _as_weight(parameter: nn.Parameter, held: list[_Place]) -> Weight | None:
    kinds = [found for place in held if (found := _kind(parameter, place))]
    if not kinds:
        return None
    kind: Kind = "embedding" if "embedding" in kinds else kinds[0]
    place = next(place for place in held if _kind(parameter, place) == kind)
    swapped = kind == "conv1d" or isinstance(place.owner, _ConvTransposeNd)
    outputs, inputs = int(swapped), int(not swapped)
    if kind == "experts":
        outputs = output_dim(place.owner)
        inputs = 3 - outputs
    return Weight(
        place.name, place.path[-1][0], place.owner, parameter, kind, outputs, inputs,
        tied=tuple(other.name for other in held if other is not place),
    )  # fmt: skip


def _kind(parameter: Tensor, place: _Place) -> Kind | None:
    owner, name = place.owner, place.attribute
    parent = place.path[-2][1] if len(place.path) > 1 else None
    if isinstance(owner, nn.MultiheadAttention):
        return "attention" if name.endswith("proj_weight") else None
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return "recurrent" if _RECURRENT.fullmatch(name) else None
    if holds_experts(owner, parameter):
        return "experts"
    if name != "weight":
        return None
    if isinstance(owner, nn.Linear):
        return "attention" if isinstance(parent, nn.MultiheadAttention) else "linear"
    if isinstance(owner, _ConvNd):
        return "conv"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    cls = type(owner)
    return "conv1d" if (cls.__name__, cls.__module__) == ("Conv1D", "transformers.pytorch_utils") else None


def _why_not(parameter: Tensor, place: _Place) -> str:
    if parameter.ndim < 2 or place.attribute.endswith("_bias"):  # stacked experts have one each
        return "a bias, a scale or another vector: few bytes, and sensitive"
    is_original = place.attribute.startswith("weight_") and place.attribute.endswith(("_orig", "_g", "_v"))
    if is_original or ".parametrizations." in f".{place.name}":
        return "an original from which a parametrization computes the weight; remove the parametrization first"
    return f"a parameter of {type(place.owner).__name__}, of which is not known how it is used"


def _any_matches(held: Iterable[_Place], selectors: Iterable[Selector]) -> bool:
    return any(_matches(place, selector) for place in held for selector in selectors)


def _matches(place: _Place, selector: Selector) -> bool:
    return matches(place.name, place.owner, selector) or any(
        matches(name, module, selector) for name, module in place.path if name or not isinstance(selector, str)
    )


def _refuse_unmatched(
    root: nn.Module, places: Iterable[list[_Place]], selectors: Iterable[Selector], argument: str
) -> None:
    every = [place for held in places for place in held]
    for selector in selectors:
        if not any(_matches(place, selector) for place in every):
            names = [place.name for place in every]
            raise ValueError(
                f"{argument}={show(selector)!r} matches no parameter of {type(root).__name__} and no module that has "
                f"one. Its parameters are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )


def _nothing_left(module: nn.Module, skipped: dict[str, str], included: list[Selector] | None) -> str:
    asked = "" if included is None else f" that include={[show(selector) for selector in included]} asks for"
    relevant = {name: reason for name, reason in skipped.items() if reason != "not in include"}
    reasons = "; ".join(f"{name!r} is {reason}" for name, reason in list(relevant.items())[:4])
    found = f": {reasons}" if reasons else ", since it has no parameters"
    return f"{type(module).__name__} has no weight to compress{asked}{found}. Name others with include=."
