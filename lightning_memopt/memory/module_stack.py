"""Which submodule runs, in the forward and in the backward.

Reads autograd's private introspection (``torch._C._current_autograd_node``, ``torch.autograd._get_sequence_nr``;
tried with torch 2.13).
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_memopt.models.in_backward import is_in_backward


class ModuleStack:
    """Which submodule runs, in the forward by hooks, in the backward by the age of autograd's nodes.

    Autograd numbers its nodes as the forward makes them. Remembering the number at each change of submodule tells,
    in the backward, which submodule made the node that runs, however often the submodule was called.
    """

    def __init__(self) -> None:
        self.names: dict[nn.Module, str] = {}
        self._running = [""]
        self._numbers = [0]
        self._modules = [""]
        self._on_enter: Callable[[nn.Module], None] | None = None
        self._handles: list[Any] = []

    @property
    def node(self) -> int | None:
        """Number of the autograd node that runs; None outside the backward."""
        node = torch._C._current_autograd_node() if self.is_bw else None
        return None if node is None else node._sequence_nr()

    @property
    def is_bw(self) -> bool:
        """Whether the backward runs."""
        return is_in_backward()

    @property
    def running(self) -> str:
        """Qualified name of the submodule that runs now."""
        if len(self._running) > 1 or not self.is_bw:
            return self._running[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        if hasattr(node, "variable"):  # a leaf's AccumulateGrad: as old as no module's call
            return ""
        return self._modules[bisect_right(self._numbers, node._sequence_nr()) - 1]

    def register_user_hooks(self, enter: Callable[[nn.Module], None], *_: Any) -> None:
        """Call ``enter`` with each module that begins its forward."""
        self._on_enter = enter

    def clear_user_hooks(self) -> None:
        """Call nobody any more."""
        self._on_enter = None

    def __enter__(self) -> "ModuleStack":
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._mark()
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        self._running.append(self.names.get(module, self._running[-1]))
        self._mark()
        if self._on_enter is not None:
            self._on_enter(module)

    def _leave_module(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if len(self._running) > 1:
            self._running.pop()
        self._mark()

    def _mark(self) -> None:
        number = torch.autograd._get_sequence_nr()
        if number < self._numbers[-1]:
            return
        self._numbers.append(number)
        self._modules.append(self._running[-1])
