"""PyTorch's own memory tracker, writing its findings into a :class:`~lightning_memopt.memory.ledger.Ledger`.

The one file that imports ``torch.distributed._tools`` (tried with torch 2.13; elsewhere a name that is missing is an
error that says so).
What PyTorch's ``MemTracker`` does is kept: it sees every operator, and follows each storage by a weak reference and
through resizes. What is replaced is its notion of where the loop is: it refuses a submodule that is called twice,
registers hooks that fail on frozen parameters, and takes an optimizer's temporaries for its state. As it wraps
``UntypedStorage.resize_`` for the time of the block, which no dispatch mode sees, this wraps ``torch.get_rng_state``.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from lightning_memopt.memory.arguments import tensor_arguments
from lightning_memopt.memory.ledger import Accumulation, Holding, Ledger, Moment, Operation, SparseCopy, State
from lightning_memopt.memory.module_stack import ModuleStack
from lightning_memopt.memory.report import Phase
from lightning_memopt.memory.workspace import Call, Workspace, describe_call
from lightning_memopt.models.mapped import is_mapped

try:
    from torch._guards import active_fake_mode
    from torch.distributed._tools.common_utils import get_untyped_storages
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _UpdateType, _WeakRefInfo
except ImportError as error:
    raise ImportError(
        f"lightning_memopt reads memory with torch.distributed._tools, which torch {torch.__version__} lacks or has "
        "changed; torch 2.11 to 2.13 have it"
    ) from error

_CATEGORY_OF = {
    _MemRefType.PARAM: "parameters",
    _MemRefType.BUFFER: "buffers",
    _MemRefType.GRAD: "gradients",
    _MemRefType.ACT: "activations",
    _MemRefType.TEMP: "temporaries",
    _MemRefType.OPT: "optimizer_state",
    _MemRefType.OTH: "other",
}


_INDICES_OF_SPARSE = {
    torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default: 3,
    torch.ops.aten._embedding_bag_backward.default: 1,
}
"""Which argument the sparse tensor that is made has for its indices. Where that has values, a fake one has a copy."""


def _strided_parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tensors that hold the bytes of ``tensor``; none where PyTorch does not let us see them."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return () if tensor.is_mkldnn else (tensor,)


class ScratchProbe(Protocol):
    """Asks an allocator how much one operator took at its worst."""

    def begin(self) -> None:
        """An operator is about to run."""

    def peak_bytes(self) -> int:
        """The most bytes in use since :meth:`begin`, less those in use then."""


class StorageTracker(MemTracker):
    """``MemTracker`` whose every update is written into a ledger.

    Args:
        device_type: Device whose bytes are counted (``"cpu"``, ``"cuda"``).
        workspace: Tells what kernels would allocate, for a run on fake tensors.
        probe: Tells the scratch of each operator while it runs.
        granularity: Of a run on fake tensors: each allocation is a multiple of so many bytes.
    """

    def __init__(
        self,
        device_type: str,
        *,
        workspace: Workspace | None = None,
        probe: ScratchProbe | None = None,
        granularity: int = 1,
    ) -> None:
        super().__init__()
        self._granularity = granularity
        self._workspace = workspace
        self._probe = probe
        self.ledger = Ledger()
        self.current_bytes = 0
        self._device_type = device_type
        self._stack = ModuleStack()
        self._mod_tracker = self._stack  # type: ignore[assignment]
        self._holdings: dict[Any, Holding] = {}
        self._owners: dict[torch.Tensor, str] = {}
        self._phase: Phase = "forward"
        self._steps_running = 0
        self._new_bytes = 0
        self._is_closed = False
        self._mode = active_fake_mode()
        self.is_fake = self._mode is not None
        self._ticks = itertools.count(1)

    @property
    def _in_ac(self) -> bool:
        # In the backward only recomputation runs with gradients enabled, with or without a module around it.
        return torch.is_grad_enabled()

    @_in_ac.setter
    def _in_ac(self, value: bool) -> None:
        pass

    def now(self) -> Moment:
        """This moment, as the ledger writes it."""
        if self._depth == 0:
            return Moment(0, "other", "")
        tick = next(self._ticks) if self.is_fake else time.time_ns()
        return Moment(tick, self.phase, self._stack.running)

    @property
    def phase(self) -> Phase:
        """What the training loop is doing."""
        if self._steps_running:
            return "step"
        return "backward" if self._stack.is_bw else self._phase

    # -- what MemTracker calls ------------------------------------------------------------------------------------

    def _update_snap(self, u_type: Any, winfo: Any, old_mem_consumed: Any = None, old_reftype: Any = None) -> None:
        # Storages outlive the block and tell of their end whenever it comes, which is nothing to this report.
        if self._is_closed or winfo.device.type != self._device_type or u_type is _UpdateType.REF:
            return
        moment = self.now()
        if u_type is _UpdateType.ADD or winfo not in self._holdings:  # seen when it was empty, and grown since
            category = "temporaries" if moment.phase == "step" else _CATEGORY_OF[winfo.reftype]
            change = self._rounded(winfo.mem_consumed)
            holding = Holding([State(moment, change, category, moment.module)], node=self._stack.node)
            self._holdings[winfo] = holding
            self.ledger.holdings.append(holding)
        else:
            holding = self._holdings.pop(winfo)
            last = holding.states[-1]
            holding.change(moment, size_bytes=0)
            change = -last.size_bytes
            if u_type is _UpdateType.SIZE:  # another allocation, of the same use
                size_bytes = self._rounded(winfo.mem_consumed)
                self._holdings[winfo] = Holding([last._replace(since=moment, size_bytes=size_bytes)])
                self.ledger.holdings.append(self._holdings[winfo])
                change += size_bytes
        self.current_bytes += change
        self._new_bytes += change

    def _rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self._granularity) * self._granularity

    def _is_elsewhere(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a fake one of somebody else's, such as a pipeline has for what other stages hold."""
        return isinstance(tensor, FakeTensor) and tensor.fake_mode is not self._mode

    def _track(self, reftype: Any, t: torch.Tensor) -> None:
        if self._is_elsewhere(t):
            return
        for part in _strided_parts(t):
            for storage in get_untyped_storages(part):
                if not is_mapped(storage):
                    self._track_storage(reftype, part, storage)

    def _track_storage(self, reftype: Any, tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
        winfo, _ = self._WINFO.get(storage, (None, None))
        if winfo is None:
            device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
            winfo, reference = _WeakRefInfo.create_winfo(storage, device, reftype, self._delete_callback)
            self._WINFO[storage] = (winfo, reference)
            if winfo.mem_consumed > 0:
                self._update_snap(_UpdateType.ADD, winfo)
        elif winfo.size != storage.size():
            consumed = winfo.mem_consumed
            winfo.update_mem_consumed(storage)
            self._update_snap(_UpdateType.SIZE, winfo, old_mem_consumed=consumed)
        holding = self._holdings.get(winfo)
        if holding is not None and holding.address is None and storage.device.type != "meta":
            holding.address = storage.data_ptr()

    def _update_peak_stats(self, peak_state: Any) -> None:
        """Nothing: the peak is found when the ledger is replayed."""

    def _pre_fw_hook(self, module: nn.Module, *_: Any) -> None:
        if self._phase == "other":
            self._phase = "forward"
        for parameter in module.parameters(recurse=False):
            self._watch_gradient(parameter)

    def _register_global_optimizer_hook(self) -> None:
        self._optimizer_hook_handles = (
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        )

    # -- what is whose --------------------------------------------------------------------------------------------

    def name_modules(self, names: dict[nn.Module, str]) -> None:
        """Learn the qualified names of the modules that are tracked."""
        self._stack.names.update(names)

    def forget_labels(self) -> None:
        """What is held and nobody names again is neither an activation nor a temporary of what comes.

        Parameters that were replaced meanwhile, by shards of them, are let go of: only the tracker held them still.
        """
        self._owners.clear()
        moment = self.now()
        for holding in self._holdings.values():
            holding.change(moment, category="other", owner="")

    def open_books(self) -> None:
        """Let the report begin now."""
        self.ledger.opened_at = self.now().time
        self._phase = "forward"

    def close_books(self) -> None:
        """Let the report end now."""
        self.ledger.closed_at = self.now().time

    def label(self, tensor: Any, category: str, owner: str | None = None) -> None:
        """Say what ``tensor`` is; it is put on the books if it is not there yet."""
        if not isinstance(tensor, torch.Tensor) or self._is_elsewhere(tensor):
            return
        self._track(_MemRefType.OTH, tensor)
        moment = self.now()
        storages = [storage for part in _strided_parts(tensor) for storage in get_untyped_storages(part)]
        for storage in storages:
            winfo, _ = self._WINFO.get(storage, (None, None))
            holding = self._holdings.get(winfo)
            if holding is None:
                continue
            last = holding.states[-1]
            if (last.category, last.owner) != (category, last.owner if owner is None else owner):
                holding.change(moment, category=category, owner=owner)

    def label_module(self, module: nn.Module) -> None:
        """Put the parameters, gradients and buffers of ``module`` on the books."""
        for submodule in module.modules():
            name = self._stack.names[submodule]
            for parameter in submodule.parameters(recurse=False):
                owner = self._owners.setdefault(parameter, name)
                self.label(parameter, "parameters", owner)
                self.label(parameter.grad, "gradients", owner)
            for buffer in submodule.buffers(recurse=False):
                self.label(buffer, "buffers", name)

    def label_optimizer_state(self, optimizer: Optimizer) -> None:
        """Put the state of ``optimizer`` on the books."""
        for parameter, state in optimizer.state.items():
            for value in tree_leaves(state):  # packed low-bit state is a dict of tensors
                self.label(value, "optimizer_state", self._owners.get(parameter, ""))

    def _watch_gradient(self, parameter: nn.Parameter) -> None:
        if not parameter.requires_grad or parameter in self._param_to_grad_hook_handles:
            return
        owner = self._owners.get(parameter, "")

        def accumulated(parameter: torch.Tensor) -> None:
            self.label(parameter.grad, "gradients", owner)

        self._param_to_grad_hook_handles[parameter] = (
            parameter.register_hook(lambda gradient: self.label(gradient, "gradients", owner)),
            parameter.register_post_accumulate_grad_hook(accumulated),
        )

    def _begin_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._steps_running += 1
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._outside_step(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": self._outside_step(kwargs["closure"])}
        return None

    def _outside_step(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Lightning runs forward and backward inside ``optimizer.step``: they are not part of the step."""

        def run() -> Any:
            running, self._steps_running = self._steps_running, 0
            self._phase = "forward"
            try:
                return closure()
            finally:
                self._steps_running = running

        return run

    def _end_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.label_optimizer_state(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.label(parameter.grad, "gradients", self._owners.get(parameter, ""))
        self._steps_running -= 1
        self._phase = "other"

    # -- the dispatch mode ----------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to make sure of it at every call takes time

    def __enter__(self) -> "StorageTracker":
        super().__enter__()
        if self._depth == 1:
            self._get_rng_state = torch.get_rng_state
            torch.get_rng_state = self._tracked_rng_state
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._is_closed = self._depth == 0
        if self._is_closed:
            torch.get_rng_state = self._get_rng_state

    def _tracked_rng_state(self) -> torch.Tensor:
        """The state that each checkpoint keeps: no operator makes it, and in a fake run it is a real tensor."""
        state = self._get_rng_state()
        self._track(_MemRefType.ACT if self.phase == "forward" else _MemRefType.TEMP, state)
        return state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked of fakes as often as all operators together
            is_asked_outside = isinstance(args[0], FakeTensor) and not args[0].fake_mode.in_kernel_invocation
            return args[0].fake_device if is_asked_outside else func(*args)
        if any(map(self._is_elsewhere, tensor_arguments(args, kwargs))):
            return func(*args, **(kwargs or {}))
        begin = self.now()
        call = describe_call(func, args, kwargs) if self._workspace is not None else None
        if self._probe is not None:
            self._probe.begin()
        self._new_bytes = 0
        result = super().__torch_dispatch__(self._completed(func, call), types, args, kwargs)
        if result is not NotImplemented:
            scratch_bytes = self._scratch_bytes(call)
            end = next(self._ticks) if self.is_fake else time.time_ns()
            operation = Operation(begin, end)
            self.ledger.operations.append(operation)
            self.ledger.add_scratch(operation, scratch_bytes)
            if self._stack.is_bw and not torch.is_grad_enabled():
                if func is torch.ops.aten.add.Tensor:
                    self._note_accumulation(args[0], result)
                elif func is torch.ops.aten.clone.default and args[0].layout is torch.sparse_coo:
                    self._note_sparse_copy(args[0], result)
            if self.is_fake and func in _INDICES_OF_SPARSE and result.layout is torch.sparse_coo:
                self._note_shared(args[_INDICES_OF_SPARSE[func]], result._indices())
        return result

    def _completed(self, func: Any, call: Call | None) -> Any:
        workspace = self._workspace
        if workspace is None or call is None:
            return func
        return lambda *args, **kwargs: workspace.complete(call, func(*args, **kwargs))

    def _scratch_bytes(self, call: Call | None) -> int:
        if self._probe is not None:
            return self._probe.peak_bytes() - self._new_bytes
        return self._workspace.scratch_bytes(call) if self._workspace is not None and call is not None else 0

    def _note_accumulation(self, first: Any, result: torch.Tensor) -> None:
        if not isinstance(first, torch.Tensor) or first._is_view():  # a view shares its storage with its base
            return
        if first.layout is not torch.strided or result.layout is not torch.strided:
            return
        into, made = self._holding_of(first), self._holding_of(result)
        if into is not None and made is not None and (into.node is None or into.node != made.node):
            self.ledger.accumulations.append(Accumulation(into, made, self.ledger.operations[-1].end))

    def _note_sparse_copy(self, gradient: torch.Tensor, result: torch.Tensor) -> None:
        parts = _strided_parts(gradient)
        if not all(part.is_contiguous() for part in parts):  # then it is copied in any case
            return
        for part, made in zip(parts, _strided_parts(result), strict=True):
            self._note_shared(part, made)

    def _note_shared(self, part: torch.Tensor, made: torch.Tensor) -> None:
        source, copy = self._holding_of(part), self._holding_of(made)
        if source is not None and copy is not None and source is not copy:
            self.ledger.sparse_copies.append(SparseCopy(source, copy))

    def _holding_of(self, tensor: torch.Tensor) -> Holding | None:
        winfo, _ = self._WINFO.get(tensor.untyped_storage(), (None, None))
        return self._holdings.get(winfo)
