"""Find the tensors that are alive now and say what each is for: no tracker has to have been running."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LiveTensor:
    """One piece of tensor memory that is in use.

    Attributes:
        size_bytes: Bytes of its storage, counted once however many tensors share it.
        shape: Shape of the tensor through which it was found.
        dtype: Its type (``"float32"``).
        category: One of :data:`~lightning_memopt.memory.report.CATEGORIES`.
        submodule: Qualified name of the submodule that owns the parameter, or made the activation; ``""`` unknown.
    """

    size_bytes: int
    shape: tuple[int, ...]
    dtype: str
    category: str
    submodule: str


def find_live_tensors(
    module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = (), device_type: str = "cpu"
) -> list[LiveTensor]:
    """List the tensor memory in use, the largest piece first.

    Looks at what the module and its optimizers hold, at what Python holds, and at what the autograd graphs below
    that saved for the backward. The maker of an activation is read from its graph: the submodule whose parameters
    went into the operation, or into the nearest operation before it that has parameters. What only C++ code holds
    (a kernel's scratch memory, gradients on their way through the backward) is not seen.

    Nothing is computed: what checkpointing or offloading packed away stays packed.

    Args:
        module: The model that was trained.
        optimizers: Its optimizers.
        device_type: ``"cpu"``, ``"cuda"``, ...: the memory to look at.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4))
        >>> live = find_live_tensors(net)
        >>> next(tensor.shape for tensor in live if tensor.submodule == "0")
        (4, 8)
    """
    survey = _Survey(device_type)
    owners: dict[int, str] = {}
    for name, owner in module.named_modules():
        for parameter in owner.parameters(recurse=False):
            owners.setdefault(id(parameter), name)
            survey.add(parameter, "parameters", name)
            if parameter.grad is not None:
                survey.add(parameter.grad, "gradients", name)
        for buffer in owner.buffers(recurse=False):
            survey.add(buffer, "buffers", name)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for tensor in _tensors_in(state):
                survey.add(tensor, "optimizer_state", owners.get(id(parameter), ""))

    held = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    for tensor, submodule in _tensors_of_graphs(held, owners):
        survey.add(tensor, "activations" if submodule is not None else "other", submodule or "")
    for tensor in held:
        survey.add(tensor, "other", "")
    return sorted(survey.found.values(), key=lambda live: -live.size_bytes)


def sum_by(live: Iterable[LiveTensor], attribute: str) -> dict[str, int]:
    """Bytes of ``live`` by ``"category"`` or ``"submodule"``, the largest first."""
    sums: Counter[str] = Counter()
    for tensor in live:
        sums[getattr(tensor, attribute)] += tensor.size_bytes
    return dict(sums.most_common())


class _Survey:
    """Collects storages; the first to name one decides what it is."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.found: dict[int, LiveTensor] = {}

    def add(self, tensor: torch.Tensor, category: str, submodule: str) -> None:
        storage = _storage(tensor)
        if storage is None or storage.device.type != self.device_type or not storage.nbytes():
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = (tensor.numel(),) if tensor.is_nested else tuple(tensor.shape)  # a nested tensor has no one shape
        found = LiveTensor(storage.nbytes(), shape, dtype, category, submodule)
        self.found.setdefault(storage.data_ptr(), found)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory of ``tensor``; None for one without (fake), and for a wrapper, whose inner tensors are found too."""
    try:
        storage = tensor.untyped_storage()
        storage.data_ptr()
        return storage
    except (RuntimeError, NotImplementedError):
        return None


def _tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors_in(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors_in(value)


def _tensors_of_graphs(
    held: Sequence[torch.Tensor], owners: Mapping[int, str]
) -> Iterator[tuple[torch.Tensor, str | None]]:
    """What is in ``held`` or saved in its graphs, with the submodule that made it; None for inputs from outside."""
    nodes = _nodes_inputs_first(tensor.grad_fn for tensor in held if tensor.grad_fn is not None)
    makers = _makers(nodes, owners)
    for tensor in held:
        if tensor.grad_fn is not None:
            yield tensor, makers[tensor.grad_fn]
    inputs = {_address(tensor) for tensor in held if tensor.grad_fn is None}
    for node in nodes:
        for name in dir(node):
            if not name.startswith("_raw_saved_"):
                continue
            for tensor in _unpacked_only(getattr(node, name, None)):
                if tensor.grad_fn is not None:
                    yield tensor, makers.get(tensor.grad_fn, "")
                elif name.startswith("_raw_saved_result") or _address(tensor) not in inputs:
                    yield tensor, makers[node]  # its own result, or a dropout mask that it alone holds
                else:
                    yield tensor, None


def _address(tensor: torch.Tensor) -> int:
    storage = _storage(tensor)
    return 0 if storage is None or storage.device.type == "meta" else storage.data_ptr()


def _nodes_inputs_first(roots: Iterable[Any]) -> list[Any]:
    """All nodes below ``roots``, each after the nodes that computed its inputs. Graphs are too deep to recurse."""
    ordered, seen = [], set()
    stack = [(root, False) for root in roots]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            ordered.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((below, False) for below, _ in node.next_functions if below is not None)
    return ordered


def _makers(nodes: Iterable[Any], owners: Mapping[int, str]) -> dict[Any, str]:
    """For each node the submodule it ran for; ``nodes`` come after the nodes of their inputs."""
    makers: dict[Any, str] = {}
    is_parameter: dict[Any, bool] = {}  # or a view or cast of one: a transposed weight, an autocast copy
    for node in nodes:
        inputs = [below for below, _ in node.next_functions if below is not None]
        variable = getattr(node, "variable", None)
        if variable is not None:
            is_parameter[node] = True
            makers[node] = owners.get(id(variable), "")
            continue
        is_parameter[node] = len(inputs) == 1 and is_parameter[inputs[0]]
        # Of several inputs the newest decides: the sum at the end of a residual block belongs to the block.
        newest_first = sorted(inputs, key=lambda below: (not is_parameter[below], -below._sequence_nr()))
        makers[node] = next((makers[below] for below in newest_first if makers[below]), "")
    return makers


def _unpacked_only(saved: Any) -> Iterator[torch.Tensor]:
    """The tensors of a saved attribute, as they lie there: asking for the unpacked value would run hooks."""
    for entry in saved if isinstance(saved, tuple) else (saved,):
        data = getattr(entry, "data", None)
        if isinstance(data, torch.Tensor):
            yield data
