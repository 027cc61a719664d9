"""Find out on real inputs whether what lies between split layers can be computed part by part."""

import io
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memopt.models.fake import is_fake
from lightning_memopt.parallel.tensor.adjust import (
    NO_ADJUSTMENT,
    Adjustment,
    find_rows_of_heads,
    possible_adjustments,
)
from lightning_memopt.parallel.tensor.collectives import part_of

if TYPE_CHECKING:
    from lightning_memopt.parallel.tensor.layers import SplitState
    from lightning_memopt.parallel.tensor.regions import Region


_MOST_IN_PREDICTION = 2**20
"""Random values that are drawn for one tensor of a step on fake tensors."""


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        reason: Why ranks cannot work on parts; empty if they can.
        adjustment: What the owner's code needs then.
        entering: Whole parameters used on the way, whose gradients are sums over the ranks.
        with_gradients: Whether gradients were looked at, too.
        input_index: Which of the owner's tensor arguments is its columns' input and nothing else; ``None`` if none.
    """

    reason: str = ""
    adjustment: Adjustment = NO_ADJUSTMENT
    entering: tuple[tuple[nn.Module, str], ...] = ()
    with_gradients: bool = False
    input_index: int | None = None


@dataclass
class Trial:
    """One run of an owner with random values for what its columns give.

    Attributes:
        region: What is tried.
        is_local: On parts, or on whole values.
        column_inputs: What the columns were called with.
        row_inputs: What reached the row.
        arguments: The owner's tensor arguments, cut off from what made them.
        inputs: Those of them that take a gradient.
        output: What the owner returned.
    """

    region: "Region"
    is_local: bool
    column_inputs: list[Tensor] = field(default_factory=list)
    row_inputs: list[Tensor] = field(default_factory=list)
    arguments: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    output: Any = None

    def column(self, split: "SplitState", x: Tensor) -> Tensor:
        """In place of a column's outputs: the same random values in any trial, or this rank's part of them."""
        assert split.shape is not None
        x = self.region.whole_of(x)
        self.column_inputs.append(x)
        whole = _draw((*x.shape[:-1], split.shape.out_features), x, seed=len(self.column_inputs))
        return self.part(whole, split.pieces) if self.is_local else whole

    def row(self, split: "SplitState", x: Tensor) -> Tensor:
        """Take what reached the row, and give the same random values in any trial."""
        assert split.shape is not None
        self.row_inputs.append(x)
        return _draw((*x.shape[:-1], split.shape.out_features), x, seed=-len(self.row_inputs))

    def part(self, whole: Tensor, pieces: int = 1) -> Tensor:
        """This rank's part of a whole value."""
        mesh = self.region.mesh
        return part_of(whole, mesh.get_local_rank(), mesh.size(), -1, pieces)


def verify(region: "Region", call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verdict:
    """Try whether the layers of ``region`` can hand over parts; all ranks of its mesh come to one verdict.

    Args:
        region: The layers.
        call: The owner's own ``forward``.
        args: Of the call that is about to be made; left as they are, as is the owner.
        kwargs: Likewise.
    """
    with_gradients = torch.is_grad_enabled()
    with _undisturbed(region.owner):
        whole, error = _run(region, False, call, args, kwargs, NO_ADJUSTMENT)
        if not _agree(region.mesh, whole is not None and len(whole.row_inputs) > 0):
            return Verdict(error or "its layers are not all called", with_gradients=with_gradients)
        first_reason = ""
        rows = _find_rows(region, args, kwargs, whole)
        for adjustment in possible_adjustments(region.group, region.owner, region.width, region.mesh.size(), rows):
            part, error = _run(region, True, call, args, kwargs, adjustment)
            reason = error if whole is None or part is None else _difference(whole, part)
            if _agree(region.mesh, not reason):
                assert whole is not None and part is not None
                entering, reason = _find_entering(whole, part) if with_gradients else ((), "")
                if not reason:
                    return Verdict("", adjustment, entering, with_gradients, _find_input(whole))
            first_reason = first_reason or reason or "another rank of the group found a difference"
    return Verdict(first_reason, with_gradients=with_gradients)


def _run(
    region: "Region",
    is_local: bool,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    adjustment: Adjustment,
) -> tuple[Trial | None, str]:
    trial = Trial(region, is_local)
    region.trial = trial
    try:
        args, kwargs = _copied((args, kwargs))
        trial.arguments = _tensors((args, kwargs))
        trial.inputs = [leaf for leaf in trial.arguments if leaf.requires_grad]
        with _NoDropout(), _unlogged(), torch.random.fork_rng(devices=_devices(region.owner)):
            trial.output = region.call_adjusted(adjustment, call, args, kwargs)
    except Exception as error:  # code of the user's, on values it was not written for
        return None, f"trying failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        region.trial = None
    return trial, ""


def _difference(whole: Trial, part: Trial) -> str:
    """How the two runs differ where they must not; empty if they do not."""
    if len(whole.row_inputs) != len(part.row_inputs) or len(whole.column_inputs) != len(part.column_inputs):
        return "its layers are called another number of times with parts"
    for ours, theirs in zip(part.column_inputs, whole.column_inputs, strict=True):
        if not _same(ours, theirs):
            return "what one of its columns is called with depends on another"
    for ours, theirs in zip(part.row_inputs, whole.row_inputs, strict=True):
        if not _same(ours, part.part(theirs)):
            return "between its layers features are mixed, so that parts give other values"
    returned, expected = _tensors(part.output), _tensors(whole.output)
    if len(returned) != len(expected) or not all(map(_same, returned, expected)):
        return "it returns something else that was computed between its layers (attention weights, for example)"
    return ""


def _find_entering(whole: Trial, part: Trial) -> tuple[tuple[tuple[nn.Module, str], ...], str]:
    """Whole parameters used between the layers, whose gradients the ranks have to add up; or why that will not do."""
    region = whole.region
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in region.owner.modules():
        for name, own in module.named_parameters(recurse=False, remove_duplicate=False):
            if own.requires_grad and not isinstance(own, DTensor):
                places.setdefault(own, []).append((module, name))
    parameters = list(places)
    totals = _gradients(whole, whole.row_inputs, [*parameters, *whole.inputs])
    mine = _gradients(part, part.row_inputs, [*parameters, *part.inputs])
    elsewhere = _gradients(whole, _tensors(whole.output), [*parameters, *whole.inputs])
    found, reason = [], ""
    for index, (total, ours, other) in enumerate(zip(totals, mine, elsewhere, strict=True)):
        if total is None or _agree(region.mesh, ours is not None and _same(ours, total)):
            continue
        if index >= len(parameters):
            reason = "one of its inputs, which takes a gradient, enters between its layers"
            continue
        parameter = parameters[index]
        summed = torch.zeros_like(total) if ours is None else ours.clone()
        dist.all_reduce(summed, group=region.mesh.get_group())
        found += places[parameter]
        if not _same(summed, total):
            reason = f"the ranks' gradients of its {tuple(parameter.shape)} parameter do not add up"
        elif other is not None or len(places[parameter]) > 1:
            reason = f"its {tuple(parameter.shape)} parameter is used between its layers and elsewhere"
    if not _agree(region.mesh, not reason):
        return (), reason or "another rank of the group found a difference"
    return tuple(found), ""


def _find_rows(
    region: "Region", args: tuple[Any, ...], kwargs: dict[str, Any], whole: Trial | None
) -> frozenset[int | str]:
    """The arguments that have a row for each head, and are not what its columns take."""
    if region.group.heads is None or whole is None:
        return frozenset()
    copies = {id(given): copy for given, copy in zip(_tensors((args, kwargs)), whole.arguments, strict=True)}
    rows = find_rows_of_heads(args, kwargs, region.group.heads.queries)
    return frozenset(key for key, value in rows if not any(copies[id(value)] is x for x in whole.column_inputs))


def _find_input(whole: Trial) -> int | None:
    first = whole.column_inputs[0] if whole.column_inputs else None
    if not all(x is first for x in whole.column_inputs):
        return None
    index = next((i for i, argument in enumerate(whole.arguments) if argument is first), None)
    if index is None or not whole.arguments[index].requires_grad:
        return index
    roots = [*whole.row_inputs, *_tensors(whole.output)]
    is_used = _gradients(whole, roots, [whole.arguments[index]])[0] is not None
    return None if is_used else index


def _gradients(trial: Trial, outputs: Iterable[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of ``inputs`` by random ones of ``outputs``, of which a part has its part."""
    roots, directions = [], []
    for index, root in enumerate(outputs):
        if not root.requires_grad:
            continue
        shape = list(root.shape)
        if trial.is_local:
            shape[-1] *= trial.region.mesh.size()
        direction = _draw(tuple(shape), root, seed=1000 + index)
        roots.append(root)
        directions.append((trial.part(direction) if trial.is_local else direction).to(root.dtype))
    if not roots or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(roots, inputs, directions, retain_graph=True, allow_unused=True))


def _draw(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Random values, of another scale in each feature, so that no mean over some looks like that of all.

    In a prediction of memory there are none where there would be many: they would take what it is to save.
    """
    if is_fake(like) and prod(shape) > _MOST_IN_PREDICTION:
        return like.new_empty(shape, dtype=_dtype_like(like))
    generator = torch.Generator().manual_seed(seed % 2**31)
    scale = torch.randn(shape[-1], generator=generator).mul_(0.5).exp_()
    values = torch.randn(shape, generator=generator) * scale
    return values.to(like.device, _dtype_like(like))


def _dtype_like(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    if is_fake(ours) or is_fake(theirs):
        return True  # a prediction of memory; fake values are neither equal nor different
    if not ours.is_floating_point():
        return bool(torch.equal(ours, theirs))
    is_half = ours.dtype in (torch.bfloat16, torch.float16)
    rtol, atol = (2e-2, 2e-2) if is_half else (1e-4, 1e-5)
    return bool(torch.allclose(ours.float(), theirs.float(), rtol, atol, equal_nan=True))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _agree(mesh: DeviceMesh, opinion: bool) -> bool:
    """Whether all ranks of the group hold it true."""
    with _disable_current_modes():  # a vote has a value also in a prediction
        votes = torch.tensor(float(opinion), device=mesh.device_type)
        dist.all_reduce(votes, dist.ReduceOp.MIN, mesh.get_group())
        return bool(votes)


def _devices(owner: nn.Module) -> list[torch.device]:
    return [device for device in {p.device for p in owner.parameters()} if device.type == "cuda"]


@contextmanager
def _unlogged() -> Iterator[None]:
    """Where shapes do not fit, which is what a trial is to find out, fake tensors log each with its traceback."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def trying(owner: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """For runs of ``owner`` that leave no trace, with copies of its arguments and without dropout."""
    with _undisturbed(owner), _NoDropout(), torch.random.fork_rng(devices=_devices(owner)):
        yield _copied((args, kwargs))


def same_on_all_ranks(ours: Any, theirs: Any, mesh: DeviceMesh) -> bool:
    """Whether on all ranks of a tensor group both have the same tensors."""
    mine, others = _tensors(ours), _tensors(theirs)
    return _agree(mesh, len(mine) == len(others) and all(map(_same, mine, others)))


@contextmanager
def _undisturbed(owner: nn.Module) -> Iterator[None]:
    """Let nothing around the call (checkpointing, offloading, counting) see the trials, nor buffers change."""
    buffers = [(buffer, buffer.clone()) for buffer in owner.buffers()]
    # Detached, since an operator that kept its own output would be kept by it, with all that both hold.
    shield = saved_tensors_hooks(Tensor.detach, lambda x: x) if torch.is_grad_enabled() else nullcontext()
    try:
        with _disable_current_modes(), shield:
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _copied(tree: Any) -> Any:
    """The same arguments, cut off from what made them; what a call could change (a cache) is copied."""
    return tree_map(_copy, tree)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if value is None or callable(value) or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    tensors: list[Tensor] = []
    file = io.BytesIO()
    _Pickler(file, tensors).dump(value)
    file.seek(0)
    return _Unpickler(file, tensors).load()


class _Pickler(pickle.Pickler):
    """Copies all but tensors, of which intermediate ones cannot be."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, index: Any) -> Tensor:
        return self.tensors[index]


class _NoDropout(TorchFunctionMode):
    """Dropout keeps everything: its masks would differ between whole values and parts."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = args[:4] + args[5:]  # the fifth is it
        return function(*args, **kwargs)


_DROPOUTS = (
    F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout,
    torch.dropout_, torch.alpha_dropout, torch.feature_dropout,
)  # fmt: skip
