"""Find linear layers that can be split together: columns of the first, then rows of the last.

Between the two only operations on each feature, or on each head, by itself may happen. That is read from shapes,
head counts and the order of registration here, which is a guess; :mod:`lightning_memopt.parallel.tensor.regions`
verifies it on real inputs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from lightning_memopt.models.heads import HEADS, KEY_VALUE_HEADS, Heads, read_heads
from lightning_memopt.models.hf_tensor_plans import read_tensor_plans
from lightning_memopt.models.linears import LinearShape, read_linear

_ELEMENTWISE = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Mish,
    nn.Softplus, nn.Dropout, nn.Identity,
)  # fmt: skip
_DEPTH = 2
"""How far below a module the linears lie that it joins: BERT's layer joins ``intermediate.dense``, two down."""


@dataclass(frozen=True)
class Column:
    """A linear layer whose outputs are split.

    Attributes:
        name: Qualified name.
        pieces: Equal parts that its outputs consist of, each of which is split: 3 for a fused ``[q, k, v]``.
    """

    name: str
    pieces: int = 1


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one module to be split together.

    Attributes:
        owner: Qualified name of the smallest module that holds them all.
        columns: The layers whose outputs are split.
        row: The layer whose inputs are what became of those outputs.
        heads: What must stay together, in an attention.
        is_proven: The module's own structure says that what lies between is element-wise.
    """

    owner: str
    columns: tuple[Column, ...]
    row: str
    heads: Heads | None = None
    is_proven: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All its layers."""
        return (*(column.name for column in self.columns), self.row)


@dataclass(frozen=True)
class _Open:
    """A linear that belongs to no group yet."""

    name: str
    shape: LinearShape
    depth: int = 1
    home: str | None = None  # the innermost module that calls it, of which what it does with others was asked first


def find_linear_groups(module: nn.Module, roles: Mapping[str, str] | None = None) -> list[LinearGroup]:
    """The groups in ``module``: Hugging Face's own plans where they exist, and what shapes and order suggest.

    Args:
        module: Any module; it is only read.
        roles: What the user says of layers, by qualified name: ``"colwise"``, ``"rowwise"`` or ``"whole"``. Such a
            layer is joined with others of which the user spoke only.

    Returns:
        Groups that share no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [group.names for group in find_linear_groups(net)]
        [('0', '2')]
    """
    roles = roles or {}
    groups = list(_groups_of_roles(module, roles))
    theirs = {name: role for name, role in read_tensor_plans(module).items() if name not in roles}
    groups += _groups_of_roles(module, theirs)
    taken = set(roles) | {name for group in groups for name in group.names}
    _collect(module, "", groups, taken)
    return groups


def _groups_of_roles(module: nn.Module, roles: Mapping[str, str]) -> Iterator[LinearGroup]:
    """What a plan says, of each module that holds one row-wise layer and column-wise ones beside it."""
    by_parent: dict[str, dict[str, str]] = {}
    for name, role in roles.items():
        if read_linear(module.get_submodule(name)) is not None:
            by_parent.setdefault(name.rpartition(".")[0], {})[name] = role
    for parent, children in by_parent.items():
        rows = [name for name, role in children.items() if role == "rowwise"]
        columns = [
            Column(name, pieces=2 if role == "packed_colwise" else 1)
            for name, role in children.items()
            if role in ("colwise", "packed_colwise")
        ]
        if len(rows) == 1 and columns:
            # A plan with queries, keys and values is an attention; an MLP's config speaks of heads as well.
            heads = read_heads(module.get_submodule(parent)) if len(columns) > 2 else None
            yield LinearGroup(parent, tuple(columns), rows[0], heads)


def _collect(module: nn.Module, name: str, groups: list[LinearGroup], taken: set[str]) -> list[_Open]:
    """Add the groups below ``module`` and return the linears left, in the order of registration."""
    shape = read_linear(module)
    if shape is not None:
        return [] if name in taken else [_Open(name, shape)]
    if isinstance(module, nn.MultiheadAttention):
        return []  # calls none of its layers
    left: list[_Open] = []
    for child_name, child in module.named_children():
        below = _collect(child, f"{name}.{child_name}" if name else child_name, groups, taken)
        deeper = read_linear(child) is None
        left += [replace(o, depth=o.depth + deeper) for o in below if o.depth + deeper <= _DEPTH]
    if isinstance(module, nn.Sequential):
        found = list(_in_sequential(module, name, left))
    elif isinstance(module, nn.ModuleList | nn.ModuleDict):
        found = []  # is not called; what its members are to each other is its parent's affair
    elif _has_no_forward(module):
        found = []  # a LightningModule whose steps call its parts: there is no call to look into
    else:
        found = list(_in_module(module, name, left))
    groups += found
    used = {linear for group in found for linear in group.names}
    if isinstance(module, nn.ModuleList) and any(next(child.children(), None) for child in module):
        return []  # blocks: never joined with each other
    left = [linear for linear in left if linear.name not in used]
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or _has_no_forward(module):
        return left
    return [replace(linear, home=name) if linear.home is None else linear for linear in left]


def _has_no_forward(module: nn.Module) -> bool:
    home = getattr(type(module).forward, "__module__", "")
    return type(module).forward is nn.Module.forward or home.split(".")[0] in ("lightning", "pytorch_lightning")


def _in_sequential(module: nn.Sequential, name: str, left: list[_Open]) -> Iterator[LinearGroup]:
    """Pairs with nothing but element-wise modules between them."""
    linears = {linear.name: linear for linear in left}
    previous: _Open | None = None
    for child_name, child in module.named_children():
        here = linears.get(f"{name}.{child_name}" if name else child_name)
        if here is None:
            if type(child) not in _ELEMENTWISE:
                previous = None
        elif previous is not None and previous.shape.out_features == here.shape.in_features:
            yield LinearGroup(name, (Column(previous.name),), here.name, is_proven=True)
            previous = None
        else:
            previous = here


def _in_module(module: nn.Module, name: str, left: list[_Open]) -> Iterator[LinearGroup]:
    attention = _attention(module, name, left)
    if attention is not None:
        yield attention
        left = [linear for linear in left if linear.name not in attention.names]
    gated = _gated(name, left)
    if gated is not None:
        yield gated
        left = [linear for linear in left if linear.name not in gated.names]
    if attention is None and _speaks_of_heads(module):
        return  # parts of an attention, of which the rest is elsewhere, or fused in a way that cannot be taken apart
    previous: _Open | None = None
    for linear in left:
        if previous is not None and _may_follow(linear, previous):
            yield LinearGroup(name, (Column(previous.name),), linear.name)
            previous = None
        else:
            previous = linear


def _may_follow(linear: _Open, previous: _Open) -> bool:
    """Whether ``linear`` may take what ``previous`` gives; not if a module that holds both knew nothing of it."""
    if linear.home is not None and linear.home == previous.home:
        return False
    return previous.shape.out_features == linear.shape.in_features


def _speaks_of_heads(module: nn.Module) -> bool:
    """Whether ``module``'s own attributes say how many heads, of queries or of keys, there are."""
    return any(isinstance(vars(module).get(name), int) for name in (*HEADS, *KEY_VALUE_HEADS))


def _attention(module: nn.Module, name: str, left: list[_Open]) -> LinearGroup | None:
    """Queries, keys and values (apart or fused), and the output projection, the last that takes all heads."""
    for index in range(len(left) - 1, 0, -1):
        row = left[index]
        width = row.shape.in_features
        heads = read_heads(module, width)
        if heads is None or heads.width != width:
            continue
        keys_width = heads.keys * heads.size
        columns, projected = [], 0
        for linear in left[:index]:
            out = linear.shape.out_features
            if out in (width, keys_width):
                pieces, projected = 1, projected + 1
            elif heads.keys == heads.queries and out in (2 * width, 3 * width):
                # Where one layer makes all three under this name, each head's lie together (NeoX, BLOOM, Falcon).
                per_head = linear.name.endswith("query_key_value")
                pieces, projected = (1 if per_head else out // width), projected + out // width
            else:
                continue
            columns.append(Column(linear.name, pieces))
        if projected == 3:
            return LinearGroup(name, tuple(columns), row.name, heads)
    return None


def _gated(name: str, left: list[_Open]) -> LinearGroup | None:
    """Two layers that widen, apart or fused, and one that narrows, in whatever order they are registered."""
    for row in left:
        outer, inner = row.shape.out_features, row.shape.in_features
        if inner == outer:
            continue
        widening = [o for o in left if o.shape.in_features == outer and o.shape.out_features == inner]
        fused = [o for o in left if o.shape.in_features == outer and o.shape.out_features == 2 * inner]
        narrowing = [o for o in left if (o.shape.in_features, o.shape.out_features) == (inner, outer)]
        if len(narrowing) == 1 and len(widening) == 2 and not fused:
            return LinearGroup(name, tuple(Column(o.name) for o in widening), row.name)
        if len(narrowing) == 1 and len(fused) == 1 and not widening:
            return LinearGroup(name, (Column(fused[0].name, pieces=2),), row.name)
    return None
