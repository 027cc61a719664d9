"""Run a step once on stubs, to learn what calls what, what it costs, and where it can be cut."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_memopt.models.blocks import find_block_stacks
from lightning_memopt.models.grouped_products import GROUPED_PRODUCT, grouped_flops
from lightning_memopt.parallel.pipeline.boundary import Boundary, can_stand_for, read_boundary
from lightning_memopt.parallel.pipeline.carried import Origins, Output
from lightning_memopt.parallel.pipeline.chain import Chain
from lightning_memopt.parallel.pipeline.operator_times import OperatorTimes
from lightning_memopt.parallel.pipeline.random_streams import python_and_numpy_kept
from lightning_memopt.parallel.pipeline.recompute import is_checkpointed, is_checkpointed_reentrantly
from lightning_memopt.parallel.pipeline.stubs import StubMode, is_stub
from lightning_memopt.parallel.refusal import StepRefused, StepWaits

Step = Callable[[], Any]

ELEMENT_COST = 16
"""Multiply-adds that take as long as writing one element, so that steps without matrix products have a cost."""

_REENTRANT = (
    "is called by `torch.utils.checkpoint` with `use_reentrant=True`, which has no gradients for what another stage "
    "sends; give `use_reentrant=False`"
)


@dataclass
class Survey:
    """What one run of a step showed.

    Positions: 0 before the first link of the chain is called, ``i + 1`` from the call of link ``i`` on.

    Attributes:
        names: The links of the chain, in the order of their calls.
        costs: Of each position, in multiply-adds of the forward, or in seconds of forward and backward.
        uses: Of each parameter that the step used, the positions.
        uncut: Links before which the step cannot be cut, and why.
        called: Of links before which it can be, the links that a stage has to call though others hold them.
        is_whole: Whether the step ran to its end; it may stop behind the last link, where it looks at values.
        stopped_by: The error that it stopped with.
        boundaries: Of each link, what a stage that begins with it would be sent.
        outputs: What each link returned, where that has no data.
    """

    names: list[str]
    costs: list[float] = field(default_factory=list)
    uses: dict[Tensor, set[int]] = field(default_factory=dict)
    uncut: dict[int, str] = field(default_factory=dict)
    called: dict[int, set[int]] = field(default_factory=dict)
    is_whole: bool = True
    stopped_by: str = ""
    boundaries: list[Boundary] = field(default_factory=list)
    outputs: dict[int, Any] = field(default_factory=dict)


def find_links(module: nn.Module, run: Step) -> list[str]:
    """Names of the modules to cut before: the blocks, or without blocks every layer, in the order of their calls.

    Each is called once, but for what is called again and again in place of blocks (ALBERT's one block): each of its
    calls is a link, and stages share what it holds.

    Args:
        module: A shadow of the model; ``run`` runs a step on it.

    Raises:
        ValueError: Fewer than two of them.
    """
    names = {submodule: name for name, submodule in module.named_modules()}
    blocks = [block for stack in find_block_stacks(module) for block in stack.blocks]
    layers = [m for m in names if m is not module and _holds(m, recurse=False)]
    parts = [m for m in names if m is not module and (_holds(m) or next(m.buffers(), None) is not None)]
    order, checkpointed, error = _order_of_calls(parts, run)
    counts = Counter(order)
    candidates = {*blocks, *layers}
    if error is not None and candidates.isdisjoint(counts):
        raise ValueError(_why_not(error)) from error
    again = {m for m in parts if counts[m] > 1}
    if not again.isdisjoint(checkpointed) or any(next(m.buffers(), None) is not None for m in again):
        again.clear()  # buffers would be written on several stages, each without what the others wrote
    repeated = again - {inner for m in again for inner in m.modules() if inner is not m}
    for known, often in ((blocks, set[nn.Module]()), (layers, repeated)):
        chosen = often.union(m for m in known if counts[m] == 1)
        innermost = {m for m in chosen if not any(other is not m and other in chosen for other in m.modules())}
        links = [names[m] for m in order if m in innermost]
        if len(links) > 1:
            return links
    raise ValueError(
        f"{type(module).__name__} has nothing to cut before: of its modules with parameters, the step calls "
        f"{', '.join(f'`{names[m]}`' for m in counts if m in candidates) or 'none'}, and a pipeline needs at least "
        "two calls of them; use `memopt_zero3` to split the parameters."
    ) from error


def _holds(module: nn.Module, recurse: bool = True) -> bool:
    return next(module.parameters(recurse), None) is not None


def _order_of_calls(
    modules: Iterable[nn.Module], run: Step
) -> tuple[list[nn.Module], set[nn.Module], Exception | None]:
    """The calls, what is called by ``torch.utils.checkpoint``, and the error that the run ended with."""
    order: list[nn.Module] = []
    checkpointed: set[nn.Module] = set()
    ended_with = None

    def see(called: nn.Module, _: Any) -> None:
        if called in order and is_checkpointed():  # whose calls cannot be told apart when they are recomputed
            checkpointed.add(called)
        order.append(called)

    hooks = [m.register_forward_pre_hook(see) for m in modules]
    try:
        run()
    except Exception as error:
        ended_with = error
    finally:
        for hook in hooks:
            hook.remove()
    return order, checkpointed, ended_with


def survey(
    module: nn.Module, links: list[str], mode: StubMode, run: Step, times: OperatorTimes | None = None
) -> Survey:
    """Run a step on a shadow of which every parameter is a stub.

    Args:
        module: The shadow.
        links: What it may be cut before.
        mode: Of its stubs.
        run: Runs a step on it.
        times: Is told of its operators, to time them afterwards.

    Raises:
        ValueError: The step fails on stubs before its last link; says where.
    """
    observer = _Surveyor(module, links, times)
    chain = Chain((module.get_submodule(name) for name in links), dict(module.named_modules()))
    chain.observer, mode.listener = observer, observer.heard
    try:
        observer.ended(run())
    except Exception as error:
        if observer.position < len(links) or isinstance(error, StepWaits):
            raise ValueError(_why_not(error)) from error
        observer.found.is_whole = False
        observer.found.stopped_by = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        chain.observer, mode.listener = None, None
        chain.remove()
    return observer.finished()


def _why_not(error: Exception) -> str:
    if isinstance(error, StepRefused):
        return str(error)
    return (
        f"the step cannot be run without values, to learn its shapes ({type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else error!r}): a stage holds no values of what other stages "
        "compute, so the step must not read them (`.item()`, `if tensor:`, `.numpy()`) before its last block."
    )


class _Surveyor:
    def __init__(self, module: nn.Module, links: list[str], times: OperatorTimes | None) -> None:
        self._times = times
        self.found = Survey(links, costs=[0.0] * (len(links) + 1))
        self.position = 0
        self._links = [module.get_submodule(name) for name in links]
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._running: int | None = None
        self._born: dict[int, int] = {}
        self._passes: dict[int, set[int]] = {}
        self._alive: list[Tensor] = []  # so that no two of them have one id
        self._handed: list[tuple[Any, Any]] = []
        self._origins = Origins()
        self._passing_by: dict[tuple[int, int], tuple[Tensor, str]] = {}  # by cut and id of the value

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != self.position:
            raise StepRefused(f"`{self.found.names[index]}` is called out of turn.")
        for value in tree_iter((args, kwargs)):
            if is_stub(value) and value not in self._names:
                passes = self._passes.setdefault(id(value), set())
                self._mark(value, range(self._born.get(id(value), index), index), passes, "is handed to it again")
                passes.add(index)
        if is_checkpointed_reentrantly():
            self.found.uncut.setdefault(index, f"`{self.found.names[index]}` {_REENTRANT}")
        self._handed.append((args, kwargs))
        self.position = index + 1
        self._running = index
        try:
            output = call(*args, **kwargs)
        finally:
            self._running = None
        if can_stand_for(self._links[index], output):
            self.found.outputs[index] = output
        return output

    def returned(self, name: str, output: Any) -> None:
        is_link = self._running is None or name == self.found.names[self._running]
        self._origins.returned(name, output, self.position, None if is_link else self._running)

    def ended(self, output: Any) -> None:
        for value in tree_iter(output):
            if is_stub(value) and value not in self._names:
                born = self._born.get(id(value), self.position)
                self._mark(value, range(born, self.position), set(), "is returned")

    def heard(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        for value in tree_iter((args, kwargs)):
            if not is_stub(value):
                continue
            if value in self._names:
                self.found.uses.setdefault(value, set()).add(self.position)
            else:
                passes = self._passes.get(id(value), set())
                allowed = passes if self._running in passes else set()
                born = self._born.get(id(value), self.position)
                self._mark(value, range(born, self.position), allowed, f"is used by {func}")
        self._origins.heard(func, args, kwargs, result, self.position, self._running)
        elements = 0
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                elements += value.numel()
                self._born[id(value)] = self.position
                self._passes.pop(id(value), None)
                self._alive.append(value)
        counted = _flops(func, args, kwargs, result) + ELEMENT_COST * elements
        self.found.costs[self.position] += counted
        if self._times is not None:
            self._times.heard(self.position, func, args, kwargs, counted)

    def _mark(self, value: Tensor, cuts: Iterable[int], allowed: set[int], how: str) -> None:
        for cut in cuts:
            if cut not in allowed and (cut, id(value)) not in self._passing_by:
                where = self.found.names[self.position - 1] if self._running is not None else None
                self._passing_by[cut, id(value)] = (
                    value,
                    f"what is computed before `{self.found.names[cut]}` without being an argument of it {how} "
                    + (f"in `{where}`" if where else "between or behind the blocks")
                    + "; hand it from block to block as an argument, or let a module return it (`nn.Identity`)",
                )

    def finished(self) -> Survey:
        """With what passes each cut by, which is known when all of its uses are."""
        found = self.found
        carried: dict[int, set[Output]] = defaultdict(set)
        for (cut, _), (value, why_not) in self._passing_by.items():
            origin = self._origins.find(value, cut)
            if origin is None:
                found.uncut.setdefault(cut, why_not)
            else:
                carried[cut] |= origin[0]
                found.called.setdefault(cut, set()).update(origin[1])
        for cut, outputs in carried.items():
            if cut not in found.uncut and self._origins.are_overwritten(outputs, cut):
                found.uncut[cut] = (
                    f"what is computed before `{found.names[cut]}` without being an argument of it is written into "
                    "in place; hand it from block to block as an argument"
                )
        for index, (args, kwargs) in enumerate(self._handed):
            values = {output: self._origins.values[output] for output in sorted(carried[index])}
            found.boundaries.append(read_boundary(args, kwargs, values))
        return found


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func is GROUPED_PRODUCT:  # which torch does not count
        return grouped_flops(*args[:2])
    cost = flop_registry.get(func._overloadpacket)
    return int(cost(*args, **kwargs, out_val=result)) if cost is not None else 0


def run_silently(module: nn.Module, run: Step) -> Step:
    """``run`` with gradients recorded and random state restored, since it is no step of the training."""

    def silent() -> Any:
        # On the device that is used, whose numbers dropout draws, and on no other, where asking alone takes memory.
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        kept = torch.random.fork_rng(devices=devices), python_and_numpy_kept()
        with kept[0], kept[1], torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            return run()

    return silent
