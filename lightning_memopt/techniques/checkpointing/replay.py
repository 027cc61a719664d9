"""Run a region a second time and leave everything but its activations as the first time left it.

Random state and autocast are put back by ``torch.utils.checkpoint``. This adds the buffers: BatchNorm's running
statistics and counters, the power iteration of spectral normalization, anything that a forward writes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import TreeSpec, tree_unflatten

_Buffers = list[tuple[nn.Module, str, torch.Tensor]]


class WrittenBuffers:
    """The buffers of a region that its forward changes: BatchNorm's, and those seen to change in the first call."""

    def __init__(self, module: nn.Module) -> None:
        self._all = _named_buffers(module)
        self._written: list[tuple[nn.Module, str]] | None = None

    def before(self) -> _Buffers:
        """Copies of the buffers that the coming call may change; of all of them before the first call."""
        buffers = self._all if self._written is None else self._written
        return [(owner, name, owner._buffers[name].detach().clone()) for owner, name in buffers]  # type: ignore[union-attr]

    def versions(self) -> list[int]:
        """In-place versions, to be handed to :meth:`learn` after the first call."""
        return [] if self._written is not None else [_version(owner, name) for owner, name in self._all]

    def learn(self, versions: list[int], before: _Buffers) -> _Buffers:
        """After a call, keep only the copies of the buffers that calls do change."""
        if self._written is None:
            # BatchNorm's kernels write the running statistics without counting a version.
            self._written = [
                (owner, name)
                for (owner, name), version in zip(self._all, versions, strict=True)
                if isinstance(owner, _NormBase) or _version(owner, name) != version
            ]
        written = {(id(owner), name) for owner, name in self._written}
        return [entry for entry in before if (id(entry[0]), entry[1]) in written]


class Replayable:
    """One call of a region, to be run by ``torch.utils.checkpoint``: for real first, as a replay after that.

    Args:
        run: The region's own forward.
        spec: How to build its arguments from their leaves.
        buffers: What it may write.
        on_replay: Called when the backward asks for the first replay.
    """

    def __init__(
        self, run: Callable[..., Any], spec: TreeSpec, buffers: WrittenBuffers, on_replay: Callable[[], None]
    ) -> None:
        self._run = run
        self._spec = spec
        self._buffers = buffers
        self._on_replay = on_replay
        self._before: _Buffers | None = None

    def __call__(self, *leaves: Any) -> Any:
        """Run the region on the leaves of its arguments and return what it returns."""
        args, kwargs = tree_unflatten(leaves, self._spec)
        if self._before is None:
            before, versions = self._buffers.before(), self._buffers.versions()
            out = self._run(*args, **kwargs)
            self._before = self._buffers.learn(versions, before)
            return out
        self._on_replay()
        with _swapped(self._before):
            return self._run(*args, **kwargs)


@contextmanager
def _swapped(before: _Buffers) -> Iterator[None]:
    """Let the replay read and write copies of the buffers as they were before the first run."""
    current = [(owner, name, owner._buffers[name]) for owner, name, _ in before]
    try:
        for owner, name, copy in before:
            owner._buffers[name] = copy.clone()
        yield
    finally:
        for owner, name, buffer in current:
            owner._buffers[name] = buffer


def _named_buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, name) for m in module.modules() for name, buffer in m._buffers.items() if buffer is not None]


def _version(owner: nn.Module, name: str) -> int:
    buffer = owner._buffers[name]
    return -1 if buffer is None or buffer.is_inference() else buffer._version
