"""Find parameters that a model's code reads without calling the module that holds them.

``F.linear(hidden, self.embed.weight)`` works on one device; where ``embed`` makes itself right at its own call (by
splitting what it holds, or gathering it), such code meets the parameter unprepared. Read from the source of the
classes, so code outside them is not seen.
"""

import ast
import inspect
import textwrap
from functools import cache
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
    reads_of: Any = _reads_of_class  # classes are hashable, which mypy does not see
    for prefix, submodule in module.named_modules():
        for path in reads_of(type(submodule)):
            name = f"{prefix}.{path}" if prefix else path
            try:
                module.get_submodule(name)
            except AttributeError:
                continue
            reads[name] = type(submodule).__name__
    return reads


@cache
def _reads_of_class(cls: type) -> frozenset[str]:
    paths: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins", "lightning", "pytorch_lightning"):
            continue  # torch's own modules are handled by kind
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and not any(
                word in function.name for word in _BEFORE_TRAINING
            ):
                paths |= _reads_of_function(function)
    return frozenset(paths)


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
