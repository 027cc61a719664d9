"""Sequence parallelism: what a block does to each token by itself, each rank does to its part of the tokens.

Norms, residual sums and dropout between the split layers then hold ``1 / N`` of their activations on each rank. The
sum after a row becomes a reduce-scatter over tokens, and a gather of tokens comes before the columns. Source:
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(https://arxiv.org/abs/2205.05198). Between blocks activations are whole, so that code there needs no change.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_memopt.models.blocks import find_block_stacks
from lightning_memopt.parallel.refusal import StepRefused
from lightning_memopt.parallel.tensor.adjust import entering
from lightning_memopt.parallel.tensor.apply import TensorParallel, stand_in
from lightning_memopt.parallel.tensor.collectives import gather, take_part
from lightning_memopt.parallel.tensor.regions import Region
from lightning_memopt.parallel.tensor.trial import same_on_all_ranks, trying

TOKENS = 1
"""The dimension of tokens in ``(batch, tokens, features)``."""


def parallelize_sequence(split: TensorParallel, mesh: DeviceMesh) -> None:
    """Let the blocks of a split module work on parts of the sequence while training.

    Args:
        split: The module, split over ``mesh``; undone with it.
        mesh: The tensor group.

    Raises:
        ValueError: No block with split layers was found.
    """
    blocks = {
        n: b for stack in find_block_stacks(split.module) for n, b in zip(stack.names, stack.blocks, strict=True)
    }
    found = False
    for name, block in blocks.items():
        inside = set(block.modules())
        regions = [region for region in split.regions if region.owner in inside]
        if regions:
            found = True
            vars(block)["_tensor_sequence"] = BlockOfSequence(name, block, regions, mesh)
            split.undo_later(partial(delattr, block, "_tensor_sequence"))
            stand_in(split, block, SequenceParallel)
    if not found:
        raise ValueError(
            f"sequence_parallel=True, and {type(split.module).__name__} has no stack of blocks with layers that are "
            "split together; leave sequence_parallel out."
        )


class BlockOfSequence:
    """What a block knows of its sequence, kept on it as ``_tensor_sequence``."""

    def __init__(self, name: str, block: nn.Module, regions: list[Region], mesh: DeviceMesh) -> None:
        self.name = name
        self.block = block
        self.regions = regions
        self.mesh = mesh
        self.is_verified = False

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's call; whole at the first, by which it is verified, and in evaluation."""
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise self._refusal("its first argument is not (batch, tokens, features)")
        if not torch.is_grad_enabled() or hidden.shape[TOKENS] % self.mesh.size():
            return call(*args, **kwargs)
        if self.is_verified:
            return self._run_on_parts(call, args, kwargs)
        output = call(*args, **kwargs)
        self._verify(call, args, kwargs)
        self.is_verified = True
        return output

    def _run_on_parts(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._on_parts():
            output = call(take_part(args[0], self.mesh, TOKENS), *args[1:], **kwargs)
        leaves, structure = tree_flatten(output)
        first = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[first] = gather(leaves[first], self.mesh, TOKENS)
        return tree_unflatten(leaves, structure)

    @contextmanager
    def _on_parts(self) -> Iterator[None]:
        within = {place for region in self.regions for place in region.entering}
        tokenwise = [
            (module, name)
            for module in self.block.modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if not isinstance(parameter, DTensor) and (module, name) not in within
        ]
        with ExitStack() as stack:
            stack.enter_context(entering(tokenwise, self.mesh))
            for region in self.regions:
                region.splits_tokens = True
                stack.callback(setattr, region, "splits_tokens", False)
            yield

    def _verify(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grouped = {name for region in self.regions for name in region.group.names}
        for name, submodule in self.block.named_modules():
            if "_tensor_split" in vars(submodule) and f"{self.name}.{name}" not in grouped:
                raise self._refusal(f"`{name}` is split by itself")
        for region in self.regions:
            if region.owner is self.block:
                raise self._refusal(f"it calls `{region.group.row}` itself, next to what it does to each token")
            if not region.is_local or region.input_index is None:
                reason = region.reason or "its input is used past its columns too"
                raise self._refusal(f"`{region.group.owner}` cannot take a gathered sequence: {reason}")
        with trying(self.block, args, kwargs) as (args, kwargs), torch.no_grad():
            whole = call(*args, **kwargs)
            try:
                part, error = self._run_on_parts(call, args, kwargs), ""
            except Exception as caught:  # code of the user's, on values it was not written for
                part, error = None, f"{type(caught).__name__}: {caught}"
        if not same_on_all_ranks(part, whole, self.mesh):
            raise self._refusal(error or "it mixes tokens outside its split layers, so that parts give other values")

    def _refusal(self, reason: str) -> StepRefused:
        return StepRefused(
            f"sequence_parallel=True, and block `{self.name}` cannot work on a part of the tokens: {reason}; leave "
            "sequence_parallel out."
        )


class SequenceParallel(nn.Module):
    """In front of the class of a block: between split layers, each rank has some of the tokens."""

    _tensor_sequence: BlockOfSequence

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's own ``forward`` does."""
        return self._tensor_sequence.run(super().forward, args, kwargs)
