"""Look at one region on fake tensors: what it computes, what its backward needs, what each operator costs.

Nothing is allocated and no parameter, buffer or random state is touched, so that the region can be profiled in the
middle of the first step. ``torch.distributed._tools`` has estimators for this, which abort without CUDA.
"""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import SAC_IGNORED_OPS
from torch.utils.flop_counter import flop_registry

from lightning_memopt.models.fake import run_operator
from lightning_memopt.models.grouped_products import GROUPED_PRODUCT, grouped_flops
from lightning_memopt.techniques.checkpointing.arguments import take_apart
from lightning_memopt.techniques.checkpointing.attributes import Attributes

FLOPS_PER_BYTE = {"cpu": 8.0, "cuda": 100.0}
"""Floating-point operations in the time that moves one byte: order of magnitude of today's machines. Only the ranking
of operators depends on it."""


@dataclass(frozen=True)
class Operator:
    """One operator call of a region that makes new tensors.

    Attributes:
        key: The operator and how many times it ran before in the region: the same call in every run of it.
        kept_bytes: Bytes of the tensors that it made.
        needed_bytes: Bytes of those that plain autograd saves for the backward.
        is_read: Whether the backward reads its result, or something computed from it and from constants alone (a
            rotated query), and not only a sum with other activations.
        flops: Floating-point operations if it is a matrix product, convolution or attention, else 0.
        cost: Time to run it again, in bytes moved (:data:`FLOPS_PER_BYTE` converts products).
        keepable: Whether its result may be kept: it draws no random numbers (a replay that skipped it would shift
            the masks of those that follow) and nothing changes it in place.
        replayed: Whether a recomputation runs it at all; it stops at the last tensor that the backward needs.
    """

    key: tuple[Any, int]
    kept_bytes: int
    needed_bytes: int
    is_read: bool
    flops: int
    cost: float
    keepable: bool
    replayed: bool


@dataclass(frozen=True)
class RegionProfile:
    """What one run of a region would do.

    Attributes:
        operators: Its operator calls in order.
        input_bytes: Bytes of its inputs that require gradients: a checkpoint holds them.
    """

    operators: tuple[Operator, ...]
    input_bytes: int

    @property
    def plain_bytes(self) -> int:
        """Bytes that plain training saves inside the region."""
        return sum(op.needed_bytes for op in self.operators)


def draws_random_numbers(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call of an operator moves the random state. Attention does only with dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    for position, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


def is_product(op: Any) -> bool:
    """Whether ``op`` is a matrix product, a convolution or attention."""
    return isinstance(op, torch._ops.OpOverload) and (
        op.overloadpacket in flop_registry
        or op is GROUPED_PRODUCT
        or op.overloadpacket.__name__.startswith("_scaled_dot_product")
    )


def product_flops(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of one call of an operator for which :func:`is_product` holds."""
    formula: Callable[..., int] | None = flop_registry.get(op.overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if op is GROUPED_PRODUCT:
        return grouped_flops(*args[:2])
    # Attention kernels without a formula, of (..., T, D) and (..., S, D): two products forward, five backward.
    is_backward = op.overloadpacket.__name__.endswith("_backward")
    query, key = args[1:3] if is_backward else args[:2]
    return (10 if is_backward else 4) * math.prod(query.shape) * key.shape[-2]


def profile_region(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RegionProfile:
    """Run ``module`` once on fake copies of its state and inputs and record it.

    Args:
        module: What the region runs; it must not be checkpointed itself while this runs.
        args: The positional arguments of the real call. Tensors are only looked at.
        kwargs: The keyword arguments.

    Raises:
        Exception: Whatever a module raises that cannot run on fake tensors (branches on values, custom kernels).
    """
    recorder = _Recorder()
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with _disable_current_modes(), fakes, torch.enable_grad(), Attributes(module).put_back():
        state = {name: _fake(tensor) for name, tensor in _state(module).items()}
        held = _replace_held_tensors(module)
        leaves, build = take_apart((args, dict(kwargs)))
        leaves = [_fake(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        fake_args, fake_kwargs = build(leaves)
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        recorder.start([*state.values(), *held], inputs)
        hooks = torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda packed: packed)
        with _without_some_hooks(module), hooks, recorder:
            # In a context of its own: what collects outputs in a context variable (transformers does) gets no fakes.
            Context().run(functional_call, module, state, fake_args, fake_kwargs)
    input_bytes = {_storage(leaf): _storage_bytes(leaf) for leaf in inputs if leaf.requires_grad}
    return RegionProfile(recorder.operators(), sum(input_bytes.values()))


def _replace_held_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Put fakes in the place of tensors in plain attributes, which operators may change in place."""
    held = []
    for attributes in map(vars, module.modules()):
        for name, value in attributes.items():
            if type(value) is torch.Tensor:
                attributes[name] = _fake(value)
                held.append(attributes[name])
    return held


@contextmanager
def _without_some_hooks(module: torch.nn.Module) -> Generator[None, None, None]:
    """Leave out hooks that run around what is recomputed, those of the region itself and FSDP2's, and users' own.

    The region's see the real call alone: one that collects its outputs would get another. FSDP2 would free the
    parameters after this call, and the real one, which gathered them, is still to come. What users do with the output
    of a layer in it is most often to note it, and they would note a fake.
    """
    hooked = list(module.modules())
    hooks = [(submodule._forward_pre_hooks, submodule._forward_hooks) for submodule in hooked]
    for submodule in hooked:
        if submodule is module or isinstance(submodule, FSDPModule):
            submodule._forward_pre_hooks, submodule._forward_hooks = OrderedDict(), OrderedDict()
        else:
            needed = ((key, hook) for key, hook in submodule._forward_hooks.items() if not _is_users(hook))
            submodule._forward_hooks = OrderedDict(needed)
    try:
        yield
    finally:
        for submodule, (before, after) in zip(hooked, hooks, strict=True):
            submodule._forward_pre_hooks, submodule._forward_hooks = before, after


def _is_users(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a partial
    written_in = getattr(function, "__module__", None) or type(function).__module__
    return written_in.partition(".")[0] not in ("torch", "lightning_memopt")


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def is_split(module: torch.nn.Module) -> bool:
    """Whether ``module`` runs on parts of its parameters, as tensor parallel layers do."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        part = DTensor.from_local(
            _fake(tensor._local_tensor).requires_grad_(False),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return part.requires_grad_(tensor.requires_grad)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not isinstance(
        tensor, torch._subclasses.fake_tensor.FakeTensor
    ):
        raise TypeError(f"tensors of class {type(tensor).__name__} cannot be profiled")
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fake.requires_grad_(tensor.requires_grad)


def _storage(tensor: torch.Tensor) -> int:
    return _held(tensor).untyped_storage()._cdata


def _storage_bytes(tensor: torch.Tensor) -> int:
    return _held(tensor).untyped_storage().nbytes()


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass
class _Call:
    key: tuple[Any, int]
    storages: dict[int, int]
    flops: int
    cost: float
    is_random: bool


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.counts: dict[Any, int] = defaultdict(int)
        self.known: set[int] = set()
        self.alive: list[torch.Tensor] = []  # so that no storage's address is used twice
        self.saved: set[int] = set()
        self.saved_numbers: set[int] = set()  # without masks and indices
        self.origin: dict[int, int | None] = {}  # storage -> the one product call it comes from; None: several things
        self.changed: set[int] = set()
        self.replayed = 0

    def start(self, state: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """Say what is there before the region runs."""
        self.known.update(_storage(tensor) for tensor in (*state, *inputs))
        self.alive.extend((*state, *inputs))
        self.origin.update((_storage(tensor), None) for tensor in inputs if tensor.requires_grad)

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved.add(_storage(tensor))
        if tensor.is_floating_point():
            self.saved_numbers.add(_storage(tensor))
        self.replayed = len(self.calls)
        return tensor.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = run_operator(func, args, kwargs)
        if func in SAC_IGNORED_OPS:
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = {_storage(t): _storage_bytes(t) for t in outputs if _storage(t) not in self.known}
        written = _written(func, args, kwargs)
        is_random = draws_random_numbers(func, args, kwargs)
        if not (is_random or _only_reads_shapes(func)):
            fresh = [t for t in outputs if _storage(t) in made]
            self._trace_origin([*fresh, *written], [*inputs, *written], is_product(func))
        key = (func, self.counts[func])
        self.counts[func] += 1
        self.changed.update(_storage(t) for t in written)
        self.known.update(made)
        self.alive.extend(outputs)
        flops = product_flops(func, args, kwargs, out) if is_product(func) else 0
        moved = sum(made.values()) + sum({_storage(t): t.nbytes for t in inputs}.values())
        cost = (moved + flops / FLOPS_PER_BYTE.get(_device_type(outputs), 100.0)) if made or written else 0.0
        self.calls.append(_Call(key, made, flops, cost, is_random))
        return out

    def _trace_origin(self, outputs: list[torch.Tensor], sources: list[torch.Tensor], is_product: bool) -> None:
        origins = {self.origin[_storage(t)] for t in sources if _storage(t) in self.origin}
        if is_product:
            origins = {len(self.calls)}
        if origins:  # else made of constants alone
            self.origin.update(dict.fromkeys(map(_storage, outputs), origins.pop() if len(origins) == 1 else None))

    def operators(self) -> tuple[Operator, ...]:
        """All calls so far."""
        read = {self.origin.get(storage) for storage in self.saved_numbers}
        return tuple(
            Operator(
                call.key,
                sum(call.storages.values()),
                sum(size for storage, size in call.storages.items() if storage in self.saved),
                position in read,
                call.flops,
                call.cost,
                bool(call.storages) and not call.is_random and self.changed.isdisjoint(call.storages),
                position < self.replayed,
            )
            for position, call in enumerate(self.calls)
        )


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    written: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written.extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return written


def _only_reads_shapes(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


def _device_type(tensors: list[torch.Tensor]) -> str:
    return tensors[0].device.type if tensors else "cpu"
