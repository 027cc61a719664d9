"""Store a module in 16 bits, except for what must stay in float32."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_memopt.models.lazy import refuse_uninitialized


class HalfStorage:
    """The parameters and buffers of a module in 16 bits; :meth:`remove` brings back the types that they had.

    Parameters keep their identity, so ties and optimizers hold. What stays in float32, or is cast to it where the
    module has another type, gets its 16-bit inputs cast to float32 and returns 16-bit outputs.

    Args:
        module: The module, converted in place.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        keep_fp32: What stays in float32. A word names the classes that contain it, in any case, of modules without
            submodules (``"norm"``: LayerNorm, LlamaRMSNorm, BatchNorm2d); a qualified name or pattern
            (``"model.lm_head"``, ``"*.router"``) names modules with all that is below them.

    Raises:
        ValueError: A parameter is tied between a module that stays and one that does not.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        >>> storage = HalfStorage(net, torch.bfloat16, ["norm"])
        >>> net[0].weight.dtype, net[1].weight.dtype, net(torch.ones(2, 8, dtype=torch.bfloat16)).dtype
        (torch.bfloat16, torch.float32, torch.bfloat16)
        >>> storage.remove()
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, keep_fp32: Sequence[str]) -> None:
        refuse_uninitialized(module)
        roots = [name for name, child in module.named_modules() if _is_named(name, child, keep_fp32)]
        kept = {submodule for name in roots for submodule in module.get_submodule(name).modules()}
        _refuse_split_ties(module, kept)
        self._dtypes = [
            (submodule, name, tensor.dtype)
            for submodule in module.modules()
            for name, tensor in _floating_tensors(submodule)
            if tensor.dtype != (torch.float32 if submodule in kept else dtype)
        ]
        for submodule, name, _ in self._dtypes:
            _cast(submodule, name, torch.float32 if submodule in kept else dtype)
        self._hooks = [
            hook
            for name in roots
            if not any(name.startswith(f"{other}.") for other in roots)
            for hook in _cast_at_boundary(module.get_submodule(name), dtype)
        ]

    def remove(self) -> None:
        """Bring back the types; values stay rounded to 16 bits, and gradients are dropped."""
        for hook in self._hooks:
            hook.remove()
        for submodule, name, dtype in self._dtypes:
            _cast(submodule, name, dtype)
        self._dtypes.clear()


def _floating_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [(name, tensor) for name, tensor in own if tensor.is_floating_point()]


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Cast in place, so that whoever holds the tensor (an optimizer, a tied module) holds the cast one."""
    tensor: torch.Tensor = getattr(module, name)
    tensor.grad = None
    tensor.data = tensor.data.to(dtype)


def find_unmatched(module: nn.Module, keep_fp32: Sequence[str]) -> list[str]:
    """The entries of ``keep_fp32`` that name nothing in ``module``."""
    modules = list(module.named_modules())
    return [entry for entry in keep_fp32 if not any(_is_named(name, child, [entry]) for name, child in modules)]


def _is_named(name: str, module: nn.Module, entries: Sequence[str]) -> bool:
    class_name = type(module).__name__.lower()
    is_leaf = next(module.children(), None) is None
    return any((is_leaf and entry.lower() in class_name) or (name and fnmatchcase(name, entry)) for entry in entries)


def _refuse_split_ties(module: nn.Module, kept: set[nn.Module]) -> None:
    owners: dict[torch.Tensor, dict[bool, str]] = {}
    for name, submodule in module.named_modules():
        for parameter_name, parameter in submodule.named_parameters(recurse=False):
            owners.setdefault(parameter, {})[submodule in kept] = f"{name}.{parameter_name}"
    for sides in owners.values():
        if len(sides) == 2:
            raise ValueError(
                f"{sides[True]} is named in keep_fp32, but it is tied to {sides[False]}, which is not, and one "
                "tensor cannot have two types; name both or neither."
            )


def _cast_at_boundary(module: nn.Module, dtype: torch.dtype) -> tuple[RemovableHandle, RemovableHandle]:
    widen, narrow = _caster(dtype, torch.float32), _caster(torch.float32, dtype)

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(widen, args), tree_map(widen, kwargs)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(narrow, output)

    return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)


def _caster(source: torch.dtype, destination: torch.dtype) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        return value.to(destination) if isinstance(value, torch.Tensor) and value.dtype == source else value

    return cast
