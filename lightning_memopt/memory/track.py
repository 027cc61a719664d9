"""Measure the memory of what runs inside a ``with`` block, to the byte."""

from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_memopt.memory._torch_tracker import StorageTracker, active_fake_mode
from lightning_memopt.memory.allocator_events import AllocatorEvents, settle
from lightning_memopt.memory.cuda_allocator import CudaAllocator
from lightning_memopt.memory.report import MemoryReport
from lightning_memopt.memory.workspace import GpuWorkspace, Need, Workspace
from lightning_memopt.models.lazy import refuse_uninitialized


class track_memory:
    """Measure the exact peak of a training step, by category and by submodule.

    Everything that PyTorch allocates inside the block is counted, and of what was there before, what is passed in:
    parameters, gradients and buffers of modules, the state of optimizers, and tensors (the batch). On the CPU that
    includes what kernels take and give back while they run, read from the allocator's events by PyTorch's profiler;
    on CUDA it is read from the caching allocator's statistics, whose peak is reset.

    Under a ``FakeTensorMode`` nothing is allocated and the report is a prediction; what kernels would take is then
    found by :mod:`lightning_memopt.memory.workspace`.

    The block may hold one step or several, any number of optimizers, a submodule may be called any number of times,
    and it need not hold modules at all. Nothing is left behind when the block raises. Entered again, it reports the
    last block.

    Args:
        *tracked: Modules, optimizers and tensors, also nested in dicts, lists and tuples; anything else in the
            containers is skipped. Give the optimizers to have the state that they already hold counted.
        timeline_points: The most points that the report's timeline has; where there are more, the largest of each run
            of neighbours.
        known_kernels: Of runs on fake tensors: what was found of kernels before, to which is added.
        gpu_granularity: Of runs on fake tensors that stand for a GPU's: its allocator hands out multiples of so many
            bytes; what the CPU's kernels take inside themselves is left out.
        device: Whose memory is counted, where what is passed in is yet to be moved there; by default, where the first
            parameter or else the first tensor is.

    Raises:
        ValueError: An argument is no module, optimizer, tensor or container.

    Example:
        >>> net = nn.Linear(8, 8)
        >>> optimizer, batch = torch.optim.AdamW(net.parameters()), torch.randn(4, 8)
        >>> with track_memory(net, optimizer, batch) as tracker:
        ...     net(batch).sum().backward()
        ...     optimizer.step()
        >>> tracker.report().by_category["parameters"]
        288
    """

    def __init__(
        self,
        *tracked: Any,
        timeline_points: int = 1000,
        known_kernels: dict[str, Need] | None = None,
        gpu_granularity: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._timeline_points = timeline_points
        self._given_device = device
        self._known_kernels = known_kernels
        self._gpu_granularity = gpu_granularity
        self._take(tracked)
        self._notes: list[str] = []
        self._workspace: Workspace | None = None
        self._device_type = "cpu"
        self._events: AllocatorEvents | None = None
        self._cuda: CudaAllocator | None = None
        self._tracker: StorageTracker | None = None
        self._is_running = False
        self._report: MemoryReport | None = None

    def __enter__(self) -> "track_memory":
        for module in self._modules:
            refuse_uninitialized(module)
        self._report, self._notes = None, []  # of a block before
        device = self._device()
        self._device_type = device.type
        is_fake = active_fake_mode() is not None
        is_cuda = device.type == "cuda" and not is_fake
        self._cuda = CudaAllocator(device) if is_cuda else None
        kind = Workspace if self._gpu_granularity is None else GpuWorkspace
        self._workspace = kind(self._known_kernels) if is_fake else None
        self._tracker = StorageTracker(
            device.type, workspace=self._workspace, probe=self._cuda, granularity=self._gpu_granularity or 1
        )
        self._label()
        self._events = AllocatorEvents() if device.type == "cpu" and not is_fake else None
        if self._events is not None and not self._events.start():
            self._events = None
            self._notes.append(
                "another profiler was running, so what kernels allocate inside themselves is not counted"
            )
        try:
            self._tracker.__enter__()
        except BaseException:
            if self._events is not None:
                self._events.stop()
            raise
        self._is_running = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._tracker is not None
        self._is_running = False
        try:
            self._tracker.__exit__(kind, error, traceback)
        finally:
            allocations = self._events.stop() if self._events is not None else []
        settle(self._tracker.ledger, allocations)
        self._tracker.ledger.undo_observer_effect()
        if self._cuda is not None:
            self._cuda.close()
            self._notes.append(self._cuda.reconcile(self._tracker.ledger))

    @property
    def current_bytes(self) -> int:
        """Bytes in use now, without what a kernel that runs holds inside."""
        return 0 if self._tracker is None else self._tracker.current_bytes

    def report(self) -> MemoryReport:
        """What the block used.

        Raises:
            ValueError: The block has not ended yet.
        """
        if self._tracker is None or self._is_running:
            raise ValueError("the report of track_memory() was asked for before its block ended; ask after it")
        if self._report is None:
            notes = self._notes + (self._workspace.notes() if self._workspace is not None else [])
            source: Literal["measured", "predicted"] = "measured" if self._workspace is None else "predicted"
            self._report = self._tracker.ledger.report(
                source=source, device=self._device_type, notes=notes, points=self._timeline_points
            )
        return self._report

    def restart(self, *tracked: Any) -> None:
        """Let the report begin here, with all that is held now, such as what earlier steps left behind.

        Args:
            *tracked: As for the class, in its place: optimizers and layers that did not exist before, say.
        """
        assert self._tracker is not None
        self._take(tracked)
        self._tracker.forget_labels()
        self._label()
        self._tracker.open_books()
        if self._cuda is not None:
            self._cuda.open()

    def end_report(self) -> None:
        """Let the report end here; what follows in the block is left out."""
        assert self._tracker is not None
        self._tracker.close_books()
        if self._cuda is not None:
            self._cuda.close()

    def _take(self, tracked: tuple[Any, ...]) -> None:
        leaves = [leaf for argument in tracked for leaf in _leaves(argument)]
        self._modules = _unique(leaf for leaf in leaves if isinstance(leaf, nn.Module))
        self._optimizers = _unique(leaf for leaf in leaves if isinstance(leaf, Optimizer))
        self._tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def _label(self) -> None:
        assert self._tracker is not None
        self._tracker.name_modules(_qualified_names(self._modules))
        for module in self._modules:
            self._tracker.label_module(module)
        for optimizer in self._optimizers:
            self._tracker.label_optimizer_state(optimizer)
        for tensor in self._tensors:
            self._tracker.label(tensor, "other", "")

    def _device(self) -> torch.device:
        if self._given_device is not None:
            return self._given_device
        for module in self._modules:
            for parameter in module.parameters():
                return parameter.device
        return self._tensors[0].device if self._tensors else torch.device("cpu")


def _leaves(argument: Any) -> list[Any]:
    if not isinstance(argument, nn.Module | Optimizer | torch.Tensor | dict | list | tuple) and not hasattr(
        argument, "keys"
    ):
        raise ValueError(
            f"track_memory() was given a {type(argument).__name__}, whose memory it cannot know; give modules, "
            "optimizers, tensors, or dicts, lists and tuples of them"
        )
    return tree_leaves(dict(argument) if hasattr(argument, "keys") else argument)


def _unique(items: Any) -> list[Any]:
    return list({id(item): item for item in items}.values())


def _qualified_names(modules: list[nn.Module]) -> dict[nn.Module, str]:
    """Names as ``named_modules`` gives them, under the class's name where there are several roots."""
    names: dict[nn.Module, str] = {}
    for module in modules:
        prefix = type(module).__name__ if len(modules) > 1 else ""
        for name, submodule in module.named_modules(prefix=prefix):
            names.setdefault(submodule, name)
    return names
