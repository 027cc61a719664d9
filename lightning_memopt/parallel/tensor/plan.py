"""Decide what of a module is split among the ranks of a tensor group, and say so.

===========  ==========================================  ===================================================
style        split                                       communication per call (forward, and again backward)
===========  ==========================================  ===================================================
"colwise"    a linear's outputs                          in a group none; alone a gather of its outputs
"rowwise"    a linear's inputs                           a sum of its outputs
"channels"   a convolution's outputs                     a gather of its outputs
"vocab"      an embedding's rows                         a sum of its outputs (forward only)
"attention"  the heads of an ``nn.MultiheadAttention``   a sum of its outputs
"experts"    the inner features of every expert          a sum of its outputs
"whole"      nothing                                     none
===========  ==========================================  ===================================================
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from lightning_memopt.models.hf_experts import read_experts
from lightning_memopt.models.hf_tensor_plans import read_tensor_plans
from lightning_memopt.models.linear_groups import Column, LinearGroup, find_linear_groups
from lightning_memopt.models.linears import read_convolution, read_linear
from lightning_memopt.models.weight_reads import find_weight_reads, reads_own

Style = Literal["colwise", "rowwise", "channels", "vocab", "attention", "experts", "whole"]

OVERRIDES = ("colwise", "rowwise", "whole")
"""What a user can ask for a module."""

SMALL = 0.01
"""Layers that stand alone are not worth their communication if all of one shape have a smaller share of the model."""


@dataclass(frozen=True)
class PlanEntry:
    """What becomes of one module that holds parameters.

    Attributes:
        name: Qualified name.
        style: How it is split.
        pieces: Of a ``"colwise"`` layer: equal parts that its outputs consist of, each of which is split.
        group: The owner of the group of linears that it is part of; ``None`` if it stands alone.
        reason: Why it is whole, or not split together with the layers next to it.
        whole_bytes: Of its parameters on one device, tied ones counted with the first module that holds them.
        rank_bytes: Of the same on one rank.
    """

    name: str
    style: Style
    pieces: int = 1
    group: str | None = None
    reason: str = ""
    whole_bytes: int = 0
    rank_bytes: int = 0


@dataclass(frozen=True)
class TensorPlan:
    """What is split of a module among ``size`` ranks.

    Attributes:
        size: Number of ranks.
        entries: Of every module that holds parameters, by qualified name, in the order of registration.
        groups: The linears that are split together.
    """

    size: int
    entries: dict[str, PlanEntry]
    groups: tuple[LinearGroup, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is split."""
        return all(entry.style == "whole" for entry in self.entries.values())


def find_tensor_plan(module: nn.Module, size: int, overrides: Mapping[str, str] | None = None) -> TensorPlan:
    """Find how to split ``module`` among ``size`` ranks.

    Args:
        module: Any module; it is only read.
        size: Number of ranks.
        overrides: Patterns of qualified names (``fnmatch``: ``"*.mlp.fc1"``) with what to do to the modules that
            match: ``"colwise"`` (a linear layer or a convolution), ``"rowwise"`` (a linear layer; an embedding's
            rows are its vocabulary) or ``"whole"``. Later patterns win.

    Raises:
        ValueError: A pattern that matches nothing, or asks for what cannot be.

    Example:
        >>> plan = find_tensor_plan(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2)
        >>> [entry.style for entry in plan.entries.values()]
        ['colwise', 'rowwise']
    """
    return _Planner(module, size, resolve_overrides(module, overrides or {})).plan()


def resolve_overrides(module: nn.Module, overrides: Mapping[str, str]) -> dict[str, str]:
    """The modules with parameters that each pattern of ``overrides`` speaks of, and what it says.

    Raises:
        ValueError: A pattern that matches nothing, or a word that is no style.
    """
    names = list(_find_holders(module))
    roles: dict[str, str] = {}
    for pattern, style in overrides.items():
        if style not in OVERRIDES:
            raise ValueError(f"{pattern!r}: {style!r} is no style; choose one of {', '.join(map(repr, OVERRIDES))}.")
        matching = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if style != "whole":
            matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"{pattern!r} matches no submodule with parameters; there are, for example, "
                f"{', '.join(map(repr, names[:6]))}."
            )
        roles.update(dict.fromkeys(matching, style))
    return roles


class _Planner:
    def __init__(self, module: nn.Module, size: int, roles: dict[str, str]) -> None:
        self.module = module
        self.size = size
        self.roles = roles
        self.holders = _find_holders(module)
        self.reads = find_weight_reads(module)
        self.theirs = read_tensor_plans(module)
        self.elements = sum(parameter.numel() for parameter in module.parameters())
        self.alike: Counter[tuple[torch.Size, ...]] = Counter()
        self.entries: dict[str, PlanEntry] = {}
        self.groups: list[LinearGroup] = []

    def plan(self) -> TensorPlan:
        apart: dict[str, str] = {}
        for group in find_linear_groups(self.module, self.roles):
            reason = self._refusal(group)
            if reason:
                apart |= dict.fromkeys(group.names, reason)
            else:
                self._add_group(group)
        alone = {name: holder for name, holder in self.holders.items() if name not in self.entries}
        self.alike.update(map(_shapes, alone.values()))
        for name, holder in alone.items():
            self.entries[name] = self._alone(name, holder, apart.get(name, ""))
        self._keep_ties()
        entries = {name: self.entries[name] for name in self.holders}
        return TensorPlan(self.size, dict(self._with_bytes(entries)), tuple(self.groups))

    def _add_group(self, group: LinearGroup) -> None:
        self.groups.append(group)
        for column in group.columns:
            self.entries[column.name] = PlanEntry(column.name, "colwise", column.pieces, group.owner)
        self.entries[group.row] = PlanEntry(group.row, "rowwise", group=group.owner)

    def _refusal(self, group: LinearGroup) -> str:
        read = [name for name in group.names if name in self.reads]
        if read:
            return f"`{read[0]}`, with which it would be split, is read by {self.reads[read[0]]} past its call"
        heads = group.heads
        if heads is not None:
            for kind, count in (("query", heads.queries), ("key and value", heads.keys)):
                if count % self.size:
                    return f"{count} {kind} heads cannot be dealt out to {self.size} ranks"
        for column in group.columns:
            if not self._divides(column):
                return f"the outputs of `{column.name}` cannot be dealt out to {self.size} ranks"
        if self._sizes(group.row)[0] % self.size:
            return f"the inputs of `{group.row}` cannot be dealt out to {self.size} ranks"
        return ""

    def _alone(self, name: str, holder: nn.Module, why: str = "") -> PlanEntry:
        """``why`` says why it is not split with others."""
        role = self.roles.get(name)
        if role == "whole":
            return PlanEntry(name, "whole", reason="the plan says so")
        style, reason = self._style_alone(name, holder, role)
        reason = reason or self._read_past(name)
        shapes = _shapes(holder)
        elements = sum(shape.numel() for shape in shapes) * max(self.alike[shapes], 1)
        if role is not None and reason:
            raise ValueError(
                f"`{name}` is to be {role!r} and cannot be split: {reason}. Leave it out of the plan, or say 'whole'."
            )
        if role is None and not reason and style != "attention" and elements < SMALL * self.elements:
            reason = "too small to be worth the communication"
        return PlanEntry(name, "whole", reason=reason) if reason else PlanEntry(name, style, reason=why)

    def _style_alone(self, name: str, holder: nn.Module, role: str | None) -> tuple[Style, str]:
        """The style, and why it cannot be."""
        if isinstance(holder, nn.MultiheadAttention):
            return "attention", self._attention_refusal(holder)
        if isinstance(holder, nn.Embedding):
            return "vocab", self._embedding_refusal(holder, role)
        if (experts := read_experts(holder, self.theirs.get(name))) is not None:
            is_uneven = bool(experts.inner % self.size)
            return "experts", f"{experts.inner} inner features do not divide by {self.size}" if is_uneven else ""
        if (convolution := read_convolution(holder)) is not None:
            return "channels", self._convolution_refusal(convolution.out_features, role)
        if read_linear(holder) is None:
            return "whole", f"{type(holder).__name__} is nothing that can be split"
        inputs, outputs = self._sizes(name)
        if role == "rowwise":
            return "rowwise", f"{inputs} inputs do not divide by {self.size}" if inputs % self.size else ""
        return "colwise", f"{outputs} outputs do not divide by {self.size}" if outputs % self.size else ""

    def _convolution_refusal(self, outputs: int, role: str | None) -> str:
        if role == "rowwise":
            return "a convolution is split by its outputs ('colwise')"
        return f"{outputs} channels do not divide by {self.size}" if outputs % self.size else ""

    def _embedding_refusal(self, embedding: nn.Embedding, role: str | None) -> str:
        if role == "colwise":
            return "an embedding is split by rows ('rowwise')"
        if "forward" in vars(embedding) or reads_own(embedding, "weight"):
            return f"{type(embedding).__name__} does not look its rows up as nn.Embedding does"
        if embedding.num_embeddings % self.size:
            return f"{embedding.num_embeddings} rows do not divide by {self.size}"
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            return "an embedding with max_norm, scale_grad_by_freq or sparse needs all its rows"
        return ""

    def _attention_refusal(self, attention: nn.MultiheadAttention) -> str:
        if type(attention).forward is not _ATTENTION_FORWARD or "forward" in vars(attention):
            return "it has a forward of its own"
        if attention.num_heads % self.size:
            return f"{attention.num_heads} heads cannot be dealt out to {self.size} ranks"
        if attention.bias_k is not None or attention.add_zero_attn:
            return "add_bias_kv and add_zero_attn add a key of their own"
        return ""

    def _read_past(self, name: str) -> str:
        return f"{self.reads[name]} reads its weight past its call" if name in self.reads else ""

    def _sizes(self, name: str) -> tuple[int, int]:
        shape = read_linear(self.module.get_submodule(name))
        assert shape is not None
        return shape.in_features, shape.out_features

    def _divides(self, column: Column) -> bool:
        return self._sizes(column.name)[1] % (column.pieces * self.size) == 0

    def _keep_ties(self) -> None:
        """Leave whole what is tied to something that is split otherwise; groups are taken apart before that."""
        while (conflict := self._find_conflict()) is not None:
            name, other = conflict
            self._give_up(name, f"tied to `{other}`, which is not split like it")

    def _find_conflict(self) -> tuple[str, str] | None:
        """A module that is split, one of a group if there is one, and another that holds the same parameter."""
        grouped = {name for group in self.groups for name in group.names}
        for uses in self._uses().values():
            if len({split for _, split in uses}) > 1:
                name, mine = max(((n, s) for n, s in uses if s is not None), key=lambda use: use[0] in grouped)
                return name, next(other for other, theirs in uses if theirs != mine)
        return None

    def _uses(self) -> dict[int, list[tuple[str, tuple[int, int] | None]]]:
        """Of each parameter, the modules that hold it, and the dimension and pieces by which they would split it."""
        uses: dict[int, list[tuple[str, tuple[int, int] | None]]] = {}
        for name, holder in self.module.named_modules(remove_duplicate=False):
            if name not in self.entries:
                continue
            splits = split_dimensions(holder, self.entries[name])
            for key, parameter in _own_parameters(holder).items():
                if key in splits or _is_layer_of_torch(holder) or reads_own(holder, key):
                    uses.setdefault(id(parameter), []).append((name, splits.get(key)))
        return uses

    def _give_up(self, name: str, reason: str) -> None:
        """Take the group of ``name`` apart, or leave it whole if it is in none."""
        together = [group for group in self.groups if name in group.names]
        if not together:
            self.entries[name] = PlanEntry(name, "whole", reason=reason)
            return
        self.groups = [group for group in self.groups if group not in together]
        for other in {other for group in together for other in group.names}:
            why = reason if other == name else f"`{name}`, with which it would be split, is {reason}"
            self.entries[other] = self._alone(other, self.holders[other], why)

    def _with_bytes(self, entries: dict[str, PlanEntry]) -> Iterator[tuple[str, PlanEntry]]:
        counted: set[int] = set()
        for name, entry in entries.items():
            holder = self.holders[name]
            splits = split_dimensions(holder, entry)
            whole = rank = 0
            for key, parameter in _own_parameters(holder).items():
                if id(parameter) not in counted:
                    counted.add(id(parameter))
                    whole += parameter.numel() * parameter.element_size()
                    rank += parameter.numel() * parameter.element_size() // (self.size if key in splits else 1)
            yield name, replace(entry, whole_bytes=whole, rank_bytes=rank)


_ATTENTION_FORWARD = nn.MultiheadAttention.forward


def split_dimensions(holder: nn.Module, entry: PlanEntry) -> dict[str, tuple[int, int]]:
    """Of each parameter of ``holder`` that is split (a dotted path for a part's), the dimension and its pieces."""
    if entry.style == "vocab":
        return {"weight": (0, 1)}
    if entry.style == "attention":
        splits = {"in_proj_weight": (0, 3), "in_proj_bias": (0, 3), "out_proj.weight": (1, 1)}
        splits |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), (0, 1))
        present = _own_parameters(holder)
        return {key: split for key, split in splits.items() if key in present}
    if entry.style == "experts":
        experts = read_experts(holder, "moe_tp_experts")
        assert experts is not None
        return experts.splits
    if entry.style == "whole":
        return {}
    shape = read_convolution(holder) if entry.style == "channels" else read_linear(holder)
    assert shape is not None
    if entry.style == "rowwise":
        return {"weight": (1 - shape.out_dimension, 1)}
    splits = {"weight": (shape.out_dimension, entry.pieces)}
    if holder._parameters.get("bias") is not None:
        splits["bias"] = (0, entry.pieces)
    return splits


def _find_holders(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters, by qualified name; an attention's parts count as itself."""
    parts = {part for sub in module.modules() if isinstance(sub, nn.MultiheadAttention) for part in sub.children()}
    return {name: sub for name, sub in module.named_modules() if sub not in parts and _own_parameters(sub)}


def _shapes(holder: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(parameter.shape for parameter in _own_parameters(holder).values())


def _is_layer_of_torch(holder: nn.Module) -> bool:
    """Whether it is, or extends, a layer of torch, which uses all parameters that are registered on it."""
    return any(base.__module__.startswith("torch.nn.") and base is not nn.Module for base in type(holder).__mro__)


def _own_parameters(holder: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ``holder`` itself uses when called; an attention's those of its parts as well."""
    recurse = isinstance(holder, nn.MultiheadAttention)
    return dict(holder.named_parameters(recurse=recurse, remove_duplicate=False))
