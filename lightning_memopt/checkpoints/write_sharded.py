"""Write a sharded checkpoint: each rank its shards, by ``torch.distributed.checkpoint``, whole or not at all."""

import errno
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_memopt.checkpoints.atomic import commit, is_disk_full, remove, save_file, temporary_of
from lightning_memopt.checkpoints.sharded import ABOUT, BESIDE, REST, state_key, weight_key
from lightning_memopt.parallel.agreement import gather_values
from lightning_memopt.parallel.gather import find_owners, full_on_cpu


def split_checkpoint(
    checkpoint: Mapping[str, Any], module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part Lightning's checkpoint into the tensors that ranks write and what rank 0 writes; all ranks together.

    Args:
        checkpoint: With ``state_dict`` and ``optimizer_states`` as this rank has them: shards, and meta tensors
            for what other ranks hold.
        module: Whose parameters have the names.
        optimizers: Of ``optimizer_states``, in their order.
    """
    apart = ("state_dict", "optimizer_states", *BESIDE)
    rest = {name: value for name, value in checkpoint.items() if name not in apart}
    tensors, described = _split_weights(checkpoint["state_dict"], "weights", module)
    about: dict[str, Any] = {"version": 1, **described, "beside": {}, "optimizers": []}
    for state in BESIDE:
        if state in checkpoint:
            own, about["beside"][state] = _split_weights(checkpoint[state], state, module)
            tensors.update(own)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for number, (state, optimizer) in enumerate(zip(checkpoint.get("optimizer_states", []), optimizers, strict=True)):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in state["param_groups"] for index in group["params"]]
        named = {index: names.get(id(p), f"#{index}") for index, p in zip(indices, parameters, strict=True)}
        own, described = _split_state(number, state, named)
        tensors.update(own)
        about["optimizers"].append(described)
    return _whole_where_needed(tensors), {**rest, ABOUT: about}


def save_sharded(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint to the directory ``path``; all ranks together.

    Args:
        tensors: What this rank has, as :func:`split_checkpoint` gives it.
        rest: Likewise; rank 0's is written.
        path: A directory on a disk that all ranks share, new or in place of an older checkpoint.

    Raises:
        OSError: A disk is full or cannot be written to; on all ranks.
    """
    _prepare(rest, path)
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(path), planner=_planner())
    except CheckpointException as error:  # a BaseException in torch
        raise _failure(error, path) from error


def save_sharded_async(
    tensors: Mapping[str, Tensor], rest: Mapping[str, Any], path: Path, group: dist.ProcessGroup | None
) -> "Future[Any]":
    """As :func:`save_sharded`, but returns when the tensors have been copied to CPU memory.

    Args:
        tensors: See there.
        rest: See there.
        path: See there. It is there when the future is done, and not before.
        group: All ranks, for this alone, by gloo: training goes on using the others.
    """
    _prepare(rest, path)
    saved: Any = dcp.async_save(dict(tensors), storage_writer=_Writer(path), planner=_planner(), process_group=group)
    result: Future[Any] = Future()

    def finish(done: "Future[Any]") -> None:
        error = done.exception()
        if isinstance(error, CheckpointException):
            error = _failure(error, path)
        if error is None:
            result.set_result(None)
        else:
            result.set_exception(error)

    saved.add_done_callback(finish)
    return result


def on_rank_zero(path: Path, act: Any) -> None:
    """Call ``act`` on rank 0, and if it fails, fail on all ranks; all of them together.

    Raises:
        OSError: As on rank 0.
        RuntimeError: On the other ranks, if rank 0 had another error.
    """
    error: Exception | None = None
    is_alone = not dist.is_initialized()
    if is_alone or dist.get_rank() == 0:
        try:
            act()
        except Exception as raised:
            error = raised
    if not is_alone:
        told: list[Any] = [None if error is None else _errno_and_text(error)]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None and error is None:
            code, text = told[0]
            if code is not None:
                raise OSError(code, text)
            raise RuntimeError(f"Rank 0 could not save `{path}`: {text}")
    if error is not None:
        raise error


def _errno_and_text(error: Exception) -> tuple[int | None, str]:
    return (error.errno, str(error.strerror)) if isinstance(error, OSError) else (None, repr(error))


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _prepare(rest: Mapping[str, Any], path: Path) -> None:
    temporary = temporary_of(path)

    def make() -> None:
        remove(temporary)
        temporary.mkdir(parents=True)
        try:
            save_file(rest, temporary / REST)
        except BaseException:
            remove(temporary)
            raise

    on_rank_zero(path, make)


def _failure(error: Any, path: Path) -> Exception:
    """What all ranks say of a save that failed on some; rank 0 cleans up, when all have stopped writing."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        remove(temporary_of(path))
    failures = {rank: one for rank, (one, _) in error.failures.items()}
    full = {rank: one for rank, one in failures.items() if is_disk_full(one)}
    if not full:
        said = "; ".join(f"rank {rank}: {one!r}" for rank, one in failures.items())
        return RuntimeError(f"`{path}` could not be saved, and nothing is left of it: {said}.")
    said = "; ".join(f"rank {rank} {getattr(one, 'strerror', one)}" for rank, one in full.items())
    return OSError(
        errno.ENOSPC,
        f"The disk is full: `{path}`: {said}. Nothing is left of it and older checkpoints are whole; make room, or "
        "save elsewhere or less (`save_weights_only=True`)",
    )


class _Writer(dcp.FileSystemWriter):
    """Writes under a temporary name; the rank that finishes, after all have written, renames."""

    def __init__(self, path: Path) -> None:
        super().__init__(temporary_of(path))
        self.final = path

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        needed = sum(_item_bytes(item) for item in plan.items)
        free = shutil.disk_usage(self.final.parent).free
        try:
            written: Any = super().write_data(plan, planner)
            written.wait()
            return written
        except Exception as error:
            if not is_disk_full(error):
                raise
            text = f"had {needed:,} bytes of tensors to write and {free:,} were free when it began"
            raise OSError(errno.ENOSPC, text) from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        commit(temporary_of(self.final), self.final)


def _item_bytes(item: Any) -> int:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        return 0
    size: int = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
    return size


def _split_weights(
    weights: Mapping[str, Any], state: str, module: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    firsts: dict[int, str] = {}
    for name, value in weights.items():
        firsts.setdefault(id(value), name)
    tensors = {
        weight_key(name, state): weights[name] for name in firsts.values() if isinstance(weights[name], Tensor)
    }
    return _without_copies(tensors, state, module), {
        "weights": {name: firsts[id(value)] for name, value in weights.items()},
        "plain_weights": {name: value for name, value in weights.items() if not isinstance(value, Tensor)},
    }


def _split_state(
    number: int, state: Mapping[str, Any], named: Mapping[Any, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    order: dict[str, list[str]] = {}
    for index, entry in state["state"].items():
        if index not in named:
            continue
        name = named[index]
        order[name] = list(entry)
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[state_key(number, name, key)] = value
            else:
                plain.setdefault(name, {})[key] = value
    names = dict(named)
    for others_plain, others_order, others_names in gather_values((plain, order, dict(named))):
        plain = {**others_plain, **plain}
        order = {**others_order, **order}
        # After `fit` a pipeline rank has whole parameters in place of those that it did not hold, and its optimizer
        # does not know them; the rank that stepped them does.
        names.update({i: name for i, name in others_names.items() if name in others_order})
    return tensors, {
        "names": names,
        "order": order,
        "plain": plain,
        "unnamed": {key: entry for key, entry in state["state"].items() if key not in named},
        "others": {key: value for key, value in state.items() if key != "state"},
    }


def _without_copies(tensors: dict[str, Tensor], state: str, module: nn.Module) -> dict[str, Tensor]:
    """Leave out what a lower rank writes: buffers differ between replicas, and the first one's are saved."""
    parameters = {weight_key(name, state) for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {key: value for key, value in tensors.items() if key not in parameters}
    rank = dist.get_rank() if dist.is_initialized() else 0
    owners = dict(zip(buffers, find_owners(buffers.values()), strict=True))
    return {key: value for key, value in tensors.items() if owners.get(key, rank) == rank}


def _whole_where_needed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what others hold, and make whole on one rank what has no one place in the whole.

    ``torch.distributed.checkpoint`` writes one block for each ``DTensor``. What tensor parallelism keeps of a fused
    weight are slices of each of its pieces (``_StridedShard``), which would be written to a wrong place in silence.
    """
    written: dict[str, Tensor] = {}
    number = 0
    for key, value in tensors.items():
        if value.is_meta:
            continue
        if not isinstance(value, DTensor) or all(type(p) in (Shard, Replicate) for p in value.placements):
            written[key] = value
            continue
        mesh = value.device_mesh
        writes = int(mesh.mesh.flatten()[number % mesh.size()]) == dist.get_rank()
        number += 1
        whole = full_on_cpu(value, keep=writes)
        if writes:
            written[key] = whole
    return written
