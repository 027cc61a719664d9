"""Find parameters that a model's code reads without calling the module that holds them.

``F.linear(hidden, self.embed.weight)`` works on one device; where ``embed`` makes itself right at its own call (by
splitting what it holds, or gathering it), such code meets the parameter unprepared. Read from the source of the
classes, so code outside them is not seen.
"""

import ast
import inspect
import textwrap
from contextlib import suppress
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_PARAMETERS = ("weight", "bias", "in_proj_weight", "in_proj_bias")
_HARMLESS = ("dtype", "device", "shape", "requires_grad", "is_meta", "ndim", "dim", "size", "numel", "is_cuda")
_BEFORE_TRAINING = ("init", "reset", "tie", "resize", "load", "configure", "from_", "set_", "get_")


def find_weight_reads(module: nn.Module) -> dict[str, str]:
    """Submodules whose weight or bias is read past their call.

    Args:
        module: Any module; it is only read.

    Returns:
        Of each such submodule, by qualified name, the class whose code reads it.

    Example:
        >>> find_weight_reads(nn.TransformerEncoderLayer(8, 2))
        {}
    """
    reads: dict[str, str] = {}
    for prefix, submodule in module.named_modules():
        for path in _reads_of_class(type(submodule)):
            name = f"{prefix}.{path}" if prefix else path
            try:
                module.get_submodule(name)
            except AttributeError:
                continue
            reads[name] = type(submodule).__name__
    return reads


def _reads_of_class(cls: type) -> set[str]:
    # torch's own modules are handled by kind
    theirs = ("torch", "builtins", "lightning", "pytorch_lightning")
    bases: list[Any] = [base for base in cls.__mro__ if base.__module__.split(".")[0] not in theirs]
    return set().union(*(_reads_in(base) for base in bases))


@cache
def _reads_in(cls: type) -> frozenset[str]:
    """Of the methods that ``cls`` itself defines. Only what names a parameter is parsed: that is what takes time."""
    paths: set[str] = set()
    for name, value in vars(cls).items():
        method: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        function = inspect.unwrap(method)
        if not isinstance(function, FunctionType) or any(word in name for word in _BEFORE_TRAINING):
            continue
        if not _names_in(function.__code__).isdisjoint(_PARAMETERS):
            with suppress(OSError, TypeError, SyntaxError):
                paths |= _reads_of_function(ast.parse(textwrap.dedent(inspect.getsource(function))))
    return frozenset(paths)


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _reads_of_function(function: ast.AST) -> set[str]:
    harmless: set[ast.AST] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS:
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "id"):
            harmless.update(node.args)
    paths = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _PARAMETERS and node not in harmless:
            path = _path_from_self(node.value)
            if path:
                paths.add(path)
    return paths


def _path_from_self(node: ast.expr) -> str:
    """``"a.b"`` for ``self.a.b``; empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
        else:
            return ""
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ""
