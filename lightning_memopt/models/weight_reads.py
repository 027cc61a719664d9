"""Find parameters that a model's code reads without calling the module that holds them.

``F.linear(hidden, self.embed.weight)`` works on one device; where ``embed`` makes itself right at its own call (by
splitting what it holds, or gathering it), such code meets the parameter unprepared. Read from the source of the
classes, so code outside them is not seen.
"""

import ast
import dis
import inspect
import operator
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_PARAMETERS = ("weight", "bias", "in_proj_weight", "in_proj_bias")
_HARMLESS = ("dtype", "device", "shape", "requires_grad", "is_meta", "ndim", "dim", "size", "numel", "is_cuda")
_BEFORE_TRAINING = ("init", "reset", "tie", "resize", "load", "configure", "from_", "set_")
_OF_TORCH = ("torch", "builtins", "lightning", "pytorch_lightning")
_UNKNOWN = object()


@dataclass(frozen=True)
class _Read:
    """Code of a class that reads a parameter.

    Attributes:
        path: The module that holds it, from the class's own: ``"a.b"`` for ``self.a.b.weight``, ``""`` for its own.
        parameter: Its name there.
        conditions: The tests of ``if`` around it, and how each has to come out.
        needs_values: Whether more is read than its type, device or shape.
    """

    path: str
    parameter: str
    conditions: tuple[tuple[ast.expr, bool], ...] = ()
    needs_values: bool = True


def find_weight_reads(module: nn.Module, *, any_use: bool = False) -> dict[str, str]:
    """Submodules whose weight or bias is read past their call.

    Args:
        module: Any module; it is only read.
        any_use: Count reads too of nothing but the type, the device or the shape.

    Returns:
        Of each such submodule, by qualified name, the class whose code reads it.

    Example:
        >>> find_weight_reads(nn.TransformerEncoderLayer(8, 2))
        {}
    """
    reads: dict[str, str] = {}
    for prefix, submodule in module.named_modules():
        for read in _reads_of_class(type(submodule)):
            if not read.path or read.parameter not in _PARAMETERS or not _may_happen(read, submodule):
                continue
            if not (read.needs_values or any_use):
                continue
            name = f"{prefix}.{read.path}" if prefix else read.path
            try:
                module.get_submodule(name)
            except AttributeError:
                continue
            reads[name] = type(submodule).__name__
    return reads


def reads_own(module: nn.Module, parameter: str) -> bool:
    """Whether code of the classes of ``module`` that are not torch's reads a parameter that is registered on it.

    A parameter may be there for its name alone: the ``bias`` of BERT's head for masked words is the decoder's.
    """
    return any(
        read.path == "" and read.parameter == parameter and read.needs_values
        for read in _reads_of_class(type(module))
    )


def _reads_of_class(cls: type) -> set[_Read]:
    # torch's own modules are handled by kind
    bases: list[Any] = [base for base in cls.__mro__ if base.__module__.split(".")[0] not in _OF_TORCH]
    return set().union(*(_reads_in(base) for base in bases))


@cache
def _reads_in(cls: type) -> frozenset[_Read]:
    """Of the methods that ``cls`` itself defines. Only what names a parameter is parsed: that is what takes time."""
    reads: set[_Read] = set()
    for name, function in _methods(cls):
        if any(word in name for word in _BEFORE_TRAINING):
            continue
        if not _names_in(function.__code__).isdisjoint(_PARAMETERS):
            with suppress(OSError, TypeError, SyntaxError):
                finder = _Finder()
                finder.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
                reads |= finder.reads
    return frozenset(reads)


def _methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(cls).items():
        method: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        function = inspect.unwrap(method)
        if isinstance(function, FunctionType):
            yield name, function


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


class _Finder(ast.NodeVisitor):
    """Collects the reads of one function."""

    def __init__(self) -> None:
        self.reads: set[_Read] = set()
        self._conditions: list[tuple[ast.expr, bool]] = []
        self._harmless: set[ast.AST] = set()

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        for branch, outcome in ((node.body, True), (node.orelse, False)):
            self._conditions.append((node.test, outcome))
            for child in branch if isinstance(branch, list) else [branch]:
                self.visit(child)
            self._conditions.pop()

    visit_IfExp = visit_If

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "id"):
            self._harmless.update(node.args)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _HARMLESS:
            self._harmless.add(node.value)
        path = _path_from_self(node.value)
        if path is not None:
            self.reads.add(_Read(path, node.attr, tuple(self._conditions), node not in self._harmless))
        self.generic_visit(node)


def _path_from_self(node: ast.expr) -> str | None:
    """``"a.b"`` for ``self.a.b``, ``""`` for ``self``; ``None`` for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
        else:
            return None
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else None


def _may_happen(read: _Read, module: nn.Module) -> bool:
    """Whether the settings of ``module`` let its code come to ``read``: BLOOM's and Mamba's keep ways not taken."""
    for test, outcome in read.conditions:
        value = _value(test, module)
        if value is not _UNKNOWN and bool(value) is not outcome:
            return False
    return True


def _value(node: ast.expr, module: nn.Module) -> Any:
    """What a test of settings comes to: of constants and of plain attributes that only ``__init__`` sets."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute) and _path_from_self(node.value) == "":
        value = vars(module).get(node.attr, _UNKNOWN)
        is_setting = isinstance(value, bool | int | float | str) and node.attr not in _changed_attributes(module)
        return value if is_setting else _UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _value(node.operand, module)
        return value if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_value(part, module) for part in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(value is not _UNKNOWN and bool(value) is decides for value in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = _value(node.left, module), _value(node.comparators[0], module)
        compare = _COMPARISONS.get(type(node.ops[0]))
        if compare is not None and _UNKNOWN not in (left, right):
            with suppress(TypeError):
                return compare(left, right)
    return _UNKNOWN


_COMPARISONS: dict[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip


def _changed_attributes(module: nn.Module) -> set[str]:
    """Attributes that methods other than ``__init__`` assign, ``training`` with them."""
    bases: list[Any] = list(type(module).__mro__)
    return set().union(*map(_changed_in, bases))


@cache
def _changed_in(cls: type) -> frozenset[str]:
    codes = [function.__code__ for name, function in _methods(cls) if name != "__init__"]
    return frozenset(name for code in codes for name in _stored_in(code))


def _stored_in(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _stored_in(constant)
