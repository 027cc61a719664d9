"""Put activation checkpointing on a module, and take it off again."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_memopt.models.lazy import refuse_uninitialized
from lightning_memopt.models.selectors import Selector
from lightning_memopt.techniques.checkpointing.arguments import refuse_iterators, take_apart
from lightning_memopt.techniques.checkpointing.budget import Keep
from lightning_memopt.techniques.checkpointing.choose import Call, KeepNothing, KeepProducts, KeepWithinBudget
from lightning_memopt.techniques.checkpointing.overlap import mark_recomputing, refuse_overlap
from lightning_memopt.techniques.checkpointing.policy import Policy, Recompute
from lightning_memopt.techniques.checkpointing.profile import draws_random_numbers, is_product
from lightning_memopt.techniques.checkpointing.replay import Around, Replayable, WrittenBuffers
from lightning_memopt.techniques.checkpointing.selection import Region, select_regions

MakeContext = Callable[[bool], AbstractContextManager[Any]]


class CheckpointHandle:
    """Undoes :func:`checkpoint_activations`; also a context manager.

    Attributes:
        names: Qualified names of the regions that are recomputed (``"net[0:3]"`` for a segment).
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        """Give every module its own ``forward`` back. May be called more than once."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def checkpoint_activations(
    module: nn.Module,
    policy: Policy | Recompute = "auto",
    *,
    k: int | None = None,
    budget: float | None = None,
    modules: Selector | Sequence[Selector] | None = None,
    around: MakeContext = lambda is_again: nullcontext(),
) -> CheckpointHandle:
    """Recompute activations of ``module`` in the backward instead of keeping them.

    Gradients, random masks, buffers and ``state_dict`` are those of plain training. Without gradients
    (``torch.no_grad``) the modules run as they are.

    Args:
        module: The model; ``forward`` is replaced on the instances of the regions until the handle is removed.
        policy: How much to recompute; see :class:`~lightning_memopt.techniques.checkpointing.policy.Recompute`.
        k: For ``"every_k"``, which leaves blocks ``k-1``, ``2k-1``, ... of each stack as they are.
        budget: For ``"budget"``.
        modules: What to recompute: classes, patterns of qualified names, or None to find it
            (:func:`~lightning_memopt.techniques.checkpointing.selection.select_regions`).
        around: Makes the context in which a region is run, from whether it is run again (to recompute it, or on fake
            tensors to look at it): where what it tells others is to be said once.

    Returns:
        A handle; ``handle.remove()`` or leaving its ``with`` block undoes everything.

    Raises:
        ValueError: Bad arguments, nothing in ``module`` to recompute, or something in it that recomputes already.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        >>> with checkpoint_activations(net, "full") as handle:
        ...     net(torch.ones(2, 4)).sum().backward()
        >>> handle.names
        ['[0:2]', '[2:4]']
    """
    asked = policy if isinstance(policy, Recompute) else Recompute(policy, k, budget)
    refuse_uninitialized(module)
    regions = select_regions(module, modules)
    if asked.policy == "every_k":
        assert asked.k is not None
        recomputed = [region for region in regions if (region.index + 1) % asked.k]
    else:
        recomputed = regions
    refuse_overlap(module, recomputed)
    chooser = _chooser(asked, regions)
    handle = CheckpointHandle()
    segments: dict[nn.Sequential, list[Region]] = defaultdict(list)
    for region in recomputed:
        handle.names.append(region.name)
        if region.sequential is None:
            handle._undo.append(_replace_forward(region.module, _block_forward(region, chooser, around)))
    for region in regions:
        if region.sequential is not None:
            segments[region.sequential].append(region)
    for sequential, parts in segments.items():
        forward = _sequential_forward(parts, {region.name for region in recomputed}, chooser, around)
        handle._undo.append(_replace_forward(sequential, forward))
    return handle


def _chooser(asked: Recompute, regions: Sequence[Region]) -> KeepNothing:
    if asked.policy == "budget":
        assert asked.budget is not None
        return KeepWithinBudget(asked.budget)
    if asked.policy == "selective" or (asked.policy == "auto" and regions[0].is_block):
        return KeepProducts()
    return KeepNothing()


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Bind ``forward`` to the instance: unlike a closure, a bound method follows ``copy.deepcopy`` of the module."""
    earlier = module.__dict__.get("forward")
    mark_recomputing(forward)
    module.forward = MethodType(forward, module)

    def undo() -> None:
        if earlier is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = earlier

    return undo


def _block_forward(region: Region, chooser: KeepNothing, around: MakeContext) -> Callable[..., Any]:
    original = getattr(region.module.forward, "__func__", None)
    if original is None:  # an instance attribute that is not a method of it
        unbound = region.module.forward

        def original(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return unbound(*args, **kwargs)

    runner = _Runner(region, chooser, around)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or runner.profiling:
            return original(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return _traced(runner.keeps_products, original, self, *args, **kwargs)
        return runner(partial(original, self), args, kwargs)

    return forward


def _sequential_forward(
    parts: list[Region], recomputed: set[str], chooser: KeepNothing, around: MakeContext
) -> Callable[..., Any]:
    runners = [_Runner(region, chooser, around) for region in parts]
    lengths = [len(list(region.module.children())) for region in parts]

    def forward(self: nn.Sequential, input: Any) -> Any:
        start = 0
        for runner, length in zip(runners, lengths, strict=True):
            run = partial(_run_children, self, start, start + length)
            start += length
            if not torch.is_grad_enabled() or runner.region.name not in recomputed:
                input = run(input)
            elif torch.compiler.is_compiling():
                input = _traced(runner.keeps_products, run, input)
            else:
                input = runner(run, (input,), {})
        return input

    return forward


def _run_children(sequential: nn.Sequential, start: int, end: int, input: Any) -> Any:
    for child in list(sequential)[start:end]:
        input = child(input)
    return input


class _Runner:
    """Runs one region in eager mode, checkpointed as its policy says."""

    def __init__(self, region: Region, chooser: KeepNothing, around: MakeContext) -> None:
        self.region = region
        self.profiling = False
        self.keeps_products = type(chooser) is not KeepNothing
        self._chooser = chooser
        self._around = around
        self._buffers: WrittenBuffers | None = None

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _without_caches(self.region, args, kwargs)
        call = Call(self.region, args, kwargs)
        with self._profiled():
            keep = self._chooser.choose(call)
        if keep is None:
            return run(*args, **kwargs)
        output = self._checkpoint(run, args, kwargs, keep)
        with self._profiled():
            self._chooser.has_run(call)
        return output

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Within the block the region's own ``forward`` is what a profile runs."""
        self.profiling = True
        try:
            with self._around(True):
                yield
        finally:
            self.profiling = False

    def _checkpoint(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], keep: Keep) -> Any:
        if self._buffers is None:
            self._buffers = WrittenBuffers(self.region.module)
        # Tensors travel as positional arguments: those a checkpoint saves through the saved-tensor hooks, so that
        # offloading sees them, and with a check that nothing changes them in place.
        leaves, build = take_apart((args, kwargs))
        refuse_iterators(self.region.name, leaves)
        first = partial(run, *args, **kwargs)
        started = self._chooser.replay_started
        replayable = Replayable(self.region.name, run, first, leaves, build, self._buffers, started)

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            keeping = (
                create_selective_checkpoint_contexts(_KeepCalls(keep)) if keep else (nullcontext(), nullcontext())
            )
            replay = Around(replayable.replaying, keeping[1])
            return Around(partial(self._around, False), keeping[0]), Around(partial(self._around, True), replay)

        with _without_autocast_cache() if keep else nullcontext():
            return checkpoint(replayable, *leaves, use_reentrant=False, context_fn=contexts)


class _KeepCalls:
    """Tells torch which operator calls of one run to keep: by operator and how often it ran before.

    torch 2.11 asks again in the replay, where calls are counted anew; 2.13 goes by the answers of the forward.
    """

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._seen: dict[tuple[Any, bool], int] = defaultdict(int)

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = self._keep.get(op)
        if kept is None:
            return CheckpointPolicy.PREFER_RECOMPUTE
        ordinal = self._seen[op, context.is_recompute]
        self._seen[op, context.is_recompute] += 1
        if ordinal in kept and not draws_random_numbers(op, args, kwargs):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _traced(keeps_products: bool, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``torch.compile`` traces: it plans by itself what to save, is told which operators are dear, and neither
    repeats a write to a buffer nor a draw of random numbers."""
    if keeps_products:
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_SAVE if is_product(op) else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Cast weights anew in each run: a cast found in the cache would be an operator that the replay has too many."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _without_caches(region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Drop key-value caches, as transformers does: the replay would append to them a second time."""
    if getattr(region.module, "_can_checkpoint_with_cache", False):
        return args, kwargs
    if not any(_is_cache(value) for value in (*args, *kwargs.values())):
        return args, kwargs
    warnings.warn(
        f"{region.name} was given a key-value cache, which recomputation would fill twice; it runs without one "
        "(set use_cache=False in the model's config)",
        stacklevel=2,
    )
    return (
        tuple(None if _is_cache(value) else value for value in args),
        {name: None if _is_cache(value) else value for name, value in kwargs.items()},
    )


def _is_cache(value: Any) -> bool:
    return any(c.__name__ == "Cache" and c.__module__.startswith("transformers.") for c in type(value).__mro__)
