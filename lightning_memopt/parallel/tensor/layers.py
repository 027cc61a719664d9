"""Layers that hold a part of their weight: classes that stand in for the layer's own while it is split.

Each does at its call what the plain layer does, with plain tensors in and out. Alone it takes and gives whole
activations, which is always right; within a :class:`~lightning_memopt.parallel.tensor.regions.Region` that was
verified, what flows from its columns to its row stays split.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lightning_memopt.models.linears import LinearShape
from lightning_memopt.parallel.local import own
from lightning_memopt.parallel.tensor.collectives import add_up, add_up_tokens, enter, gather, take_part

if TYPE_CHECKING:
    from lightning_memopt.parallel.tensor.regions import Region


@dataclass(eq=False)
class SplitState:
    """What a split layer knows of itself, kept on it as ``_tensor_split``.

    Attributes:
        mesh: The tensor group.
        shape: Of a linear layer: its sizes on one device.
        pieces: Equal parts of its outputs, each of which is split.
        region: The group of layers that it belongs to, if any.
        added_once: Of experts: whole parameters that are part of what the ranks' outputs add up to.
        gives_shards: A head whose outputs go to the loss as a ``DTensor``, split by class, while training.
    """

    mesh: DeviceMesh
    shape: LinearShape | None = None
    pieces: int = 1
    region: "Region | None" = None
    added_once: tuple[str, ...] = ()
    gives_shards: bool = False


class ColumnParallel(nn.Module):
    """In front of a linear layer's class: each rank has some of the outputs."""

    _tensor_split: SplitState

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``, or to ``(..., out / N)`` within a verified region."""
        split, region = self._tensor_split, self._tensor_split.region
        if region is not None and region.trial is not None:
            return region.trial.column(split, x)
        x = region.enter(x) if region is not None else enter(x, split.mesh)
        y = _linear(x, self, split)
        if split.gives_shards and torch.is_grad_enabled():
            return DTensor.from_local(y, split.mesh, [Shard(y.ndim - 1)], run_check=False)
        return y if region is not None and region.is_inside else gather(y, split.mesh, -1, split.pieces)


class RowParallel(nn.Module):
    """In front of a linear layer's class: each rank has some of the inputs."""

    _tensor_split: SplitState

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)``, or ``(..., in / N)`` within a verified region, to ``(..., out)``."""
        split, region = self._tensor_split, self._tensor_split.region
        if region is not None and region.trial is not None:
            return region.trial.row(split, x)
        if region is None or not region.is_inside:
            x = take_part(x, split.mesh)
        bias = self._parameters.get("bias")
        is_token_wise = region is not None and region.splits_tokens
        y = _linear(x, self, split, with_bias=False)
        y = add_up_tokens(y, split.mesh) if is_token_wise else add_up(y, split.mesh)
        return y if bias is None else y + bias.to(y.dtype)


class VocabParallel(nn.Embedding):
    """In place of ``nn.Embedding``, under the user's class if that is another: each rank has some of the rows."""

    _tensor_split: SplitState

    def forward(self, ids: Tensor) -> Tensor:
        """``(...)`` to ``(..., features)``."""
        replicated = DTensor.from_local(ids, self._tensor_split.mesh, [Replicate()], run_check=False)
        rows: Any = F.embedding(replicated, self.weight, self.padding_idx)
        return own(rows.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()]))


class ChannelParallel(nn.Module):
    """In front of a convolution's class: each rank has some of the output channels."""

    _tensor_split: SplitState

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``([batch,] in, ...)`` to ``([batch,] out, ...)``."""
        mesh = self._tensor_split.mesh
        with _local_parameters(self):
            y = super().forward(enter(x, mesh), *args, **kwargs)
        return gather(y, mesh, -1 - len(self.kernel_size))


class ExpertsParallel(nn.Module):
    """In front of the class of a mixture's experts: each rank has some of the inner features of every expert."""

    _tensor_split: SplitState

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts' own ``forward`` does; scores and hidden states enter, and the output is added up."""
        mesh = self._tensor_split.mesh
        args, kwargs = tree_map(lambda x: enter(x, mesh) if _is_floating(x) else x, (args, kwargs))
        with _local_parameters(self):
            for name in self._tensor_split.added_once:
                whole: Any = self._parameters[name]
                self._parameters[name] = enter(whole, mesh) / mesh.size()  # type: ignore[assignment]
            return add_up(super().forward(*args, **kwargs), mesh)


@contextmanager
def _local_parameters(layer: nn.Module) -> Iterator[None]:
    """Within the block, its own code finds this rank's parts in place of its parameters."""
    whole = dict(layer._parameters)
    layer._parameters.update({name: local(part) for name, part in whole.items()})  # type: ignore[misc]
    try:
        yield
    finally:
        layer._parameters.update(whole)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def local(parameter: nn.Parameter | None) -> Tensor | None:
    """This rank's part of a parameter, through which gradients flow back to it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _linear(x: Tensor, layer: nn.Module, split: SplitState, with_bias: bool = True) -> Tensor:
    weight = local(layer._parameters["weight"])
    bias = local(layer._parameters.get("bias")) if with_bias else None
    assert weight is not None and split.shape is not None
    return F.linear(x, weight.t() if split.shape.transposed else weight, bias)
