"""Tensors without data, that stand for what a rank does not hold, and for all that follows from it.

They are torch's fake tensors, which know shape, dtype and device. What is computed from a stub is a stub; what is not
(position ids, masks, rotary tables) is computed for real, beside them. Adapter for ``torch._subclasses``, private;
tried with torch 2.13.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_memopt.models.grouped_products import teach_grouped_products
from lightning_memopt.parallel.refusal import StepRefused, StepWaits

Listener = Callable[[Any, Sequence[Any], dict[str, Any], Any], None]
"""Told of each operator on stubs: the operator, its arguments and what it returned."""

_CTC_LOSSES = (torch.ops.aten._ctc_loss.default, torch.ops.aten._ctc_loss.Tensor)
"""The shape of what they keep for the backward follows from values, so torch refuses them on fake tensors."""


class StubMode(FakeTensorMode):
    """Runs operators of which an argument is a stub; real tensors may stand beside them.

    Attributes:
        listener: Told of each operator, if there is one.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        teach_grouped_products()
        self._is_beside_fakes = active_fake_mode() is not None
        self.listener: Listener | None = None
        self._depth = 0
        self._lookups: dict[Hashable, tuple[torch.Size, torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            _refuse_waiting_for_all(func, args)
        _refuse_writing_to_real(func, args)
        if self._is_beside_fakes:
            args, kwargs = tree_map_only(FakeTensor, self._own, (args, kwargs))
        self._depth += 1
        try:
            if func is torch.ops.aten.embedding.default:
                result = self._look_up(func, types, args, kwargs)
            elif func in _CTC_LOSSES:
                result = self._ctc_loss(*args[:2])
            else:
                stubs = args if func._schema.is_mutable else tuple(map(self._without_values, args))
                result = super().__torch_dispatch__(func, types, stubs, kwargs)
        finally:
            self._depth -= 1
        if self.listener is not None and self._depth == 0:
            self.listener(func, args, kwargs, result)
        return result

    def _look_up(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """An embedding, which every stage but the first calls in each step, on indices that are real.

        torch remembers the results of operators on fake tensors only; this takes milliseconds otherwise.
        """
        table, indices, *_ = args
        key = (table.shape[1:], table.dtype, table.device, indices.shape)
        if key not in self._lookups:
            result: Any = super().__torch_dispatch__(func, types, args, kwargs)
            self._lookups[key] = result.shape, result.dtype
        shape, dtype = self._lookups[key]
        return FakeTensor(self, torch.empty(shape, dtype=dtype, device="meta"), table.device)

    def _ctc_loss(self, log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each sample, and of each prefix of its target, of which there are not more than this."""
        time, batch, _ = log_probs.shape
        with self:
            return log_probs.new_empty(batch), log_probs.new_empty(batch, time, 2 * targets.shape[-1] + 1)

    def _without_values(self, value: Any) -> Any:
        """A stub in place of a real tensor, of which torch would copy all that is known of it, its views and
        gradients too: that takes as long as the operator. Numbers have rules of their own and stay."""
        if type(value) not in (Tensor, nn.Parameter) or value.dim() == 0 or value.layout != torch.strided:
            return value
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(self, meta, value.device)

    def _own(self, tensor: FakeTensor) -> FakeTensor:
        """A stub in place of a fake of another mode: in a run that is predicted, that is a tensor with values."""
        if is_stub(tensor):
            return tensor
        make: Any = torch.empty_strided
        with self:
            return make(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.fake_device)

    def stub(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A stub like ``tensor``, which is taken for one on ``device``; a parameter for a parameter."""
        make: Any = torch.empty_strided
        with self:
            fake = make(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(fake, requires_grad=tensor.requires_grad)
            return fake


def is_stub(value: object) -> bool:
    """Whether ``value`` is a tensor without data.

    Where a run is predicted, those with data are fake too, of another mode.
    """
    return isinstance(value, FakeTensor) and isinstance(value.fake_mode, StubMode)


def _refuse_writing_to_real(func: Any, args: Sequence[Any]) -> None:
    """A real tensor that a stub is written into would look real and hold the wrong values."""
    if not func._schema.is_mutable:
        return
    for argument, value in zip(func._schema.arguments, args, strict=False):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written and isinstance(value, Tensor) and not is_stub(value):
            raise StepRefused(
                f"the step writes ({func}) what is computed from parameters into a tensor of shape "
                f"{tuple(value.shape)} that it made without them, so a stage that lacks those parameters cannot tell "
                "that it lacks the values; make the tensor from the values instead (`torch.cat`, `torch.stack`, "
                "`torch.where`)."
            )


WAITS_FOR_ALL = (
    "the step calls `torch.distributed`, in which all ranks wait for each other, and only the last stage runs a step "
    "to its end; call it in a hook, such as `on_train_batch_end`, or give `self.log` what is to be reduced."
)


def _refuse_waiting_for_all(func: Any, args: Sequence[Any]) -> None:
    """Other stages are among all ranks; the groups of ranks with other batches are the strategies' own affair."""
    world: Any = dist.group.WORLD
    for argument, value in zip(func._schema.arguments, args, strict=False):
        is_group = str(argument.type).endswith(".ProcessGroup")
        if is_group and dist.ProcessGroup.unbox(value).group_name == world.group_name:
            raise StepWaits(WAITS_FOR_ALL)


@contextmanager
def in_place_of(places: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Within the block, modules have other parameters and buffers.

    Args:
        places: The module, the name, and what it has within the block.
    """
    # Asked for anew each time: a forward may put another tensor in place of a buffer (`self.mean = ...`).
    before = [owner._parameters.get(name, owner._buffers.get(name)) for owner, name, _ in places]
    for owner, name, other in places:
        _put(owner, name, other)
    try:
        yield
    finally:
        for (owner, name, _), own in zip(places, before, strict=True):
            _put(owner, name, own)


def find_places(module: nn.Module, tensors: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """Each registration (owner, name, tensor) of a parameter or buffer that is in ``tensors``."""
    return [
        (owner, name, tensor)
        for owner in module.modules()
        for registered in (owner._parameters, owner._buffers)
        for name, tensor in registered.items()
        if tensor is not None and tensor in tensors
    ]


def _put(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
    registered = owner._parameters if name in owner._parameters else owner._buffers
    registered[name] = tensor  # type: ignore[assignment]
    if isinstance(owner, nn.RNNBase) and name in owner._flat_weights_names:
        owner._flat_weights[owner._flat_weights_names.index(name)] = tensor  # recurrent modules keep a list


def shadow_of(module: nn.Module, stubs: dict[Tensor, Tensor]) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy of the tree of modules, with stubs for tensors; all else that modules hold is shared.

    Shapes can be learned from it whatever is done to the original: shards, checkpoints, hooks.

    Args:
        module: The root.
        stubs: What stands for its parameters and buffers; what is not in it is shared.

    Returns:
        The copy of the root, and of each module its copy.
    """
    copies: dict[nn.Module, nn.Module] = {}
    for original in module.modules():
        twin = object.__new__(type(original))
        twin.__dict__.update(original.__dict__)
        for name in ("_parameters", "_buffers"):
            twin.__dict__[name] = {
                key: stubs.get(value, value) if value is not None else None
                for key, value in original.__dict__[name].items()
            }
        for name, value in original.__dict__.items():
            # What the shadow's steps append stays there; and the original gets hooks (FSDP2's) that are not for it.
            if isinstance(value, list | dict | set) and name not in ("_parameters", "_buffers", "_modules"):
                twin.__dict__[name] = copy.copy(value)
        if isinstance(original, nn.RNNBase):
            twin.__dict__["_flat_weights"] = [stubs.get(w, w) for w in original._flat_weights]  # type: ignore[arg-type]
        copies[original] = twin
    for twin in copies.values():
        twin.__dict__["_modules"] = {
            key: copies[child] if child is not None else None for key, child in twin.__dict__["_modules"].items()
        }
    return copies[module], copies
