"""Hold an optimizer's state in few bits between steps, with the optimizer otherwise as the user made it."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_memopt.parallel.local import like_shard, local_gradient, local_of
from lightning_memopt.parallel.shards import shards_of_whole
from lightning_memopt.techniques.blockwise import BlockwiseCodec, PackedTensor, as_packed
from lightning_memopt.techniques.low_bit_engines import (
    SIGNED,
    SMALLEST,
    Bits,
    Engine,
    EngineName,
    OwnEngine,
    check_engine,
)
from lightning_memopt.techniques.low_bit_libraries import BitsandbytesEngine, TorchaoEngine
from lightning_memopt.techniques.per_parameter import replace_step, step_alone, step_one

SUPPORTED = (AdamW, Adam, SGD)


def hold_low_bit_state(
    module: nn.Module, optimizer: Optimizer, bits: Bits = 8, engine: EngineName = "memopt"
) -> "LowBitState":
    """Keep what ``optimizer`` remembers of each large parameter in 8 or 4 bits instead of 32.

    The optimizer object stays, with its groups, hyper-parameters, hooks and learning-rate schedulers, and so does its
    arithmetic: a step unpacks the state of a piece of a parameter, lets the optimizer step that piece, and packs
    the state again. State that is there already, or that is loaded later (from a run with or without low-bit state),
    is packed at once. ``state_dict`` holds packed tensors as plain dicts of plain tensors.

    Of sharded parameters each rank packs the state of what it holds, in blocks of its own. In ``state_dict`` that is
    unpacked, as shards in the CPU's memory, so that checkpoints do not depend on who held what; packed again by the
    same ranks it is what it was.

    With an ``engine`` of a library, its kernel steps the large parameters in place of the optimizer's step, with the
    hyper-parameters of the optimizer's groups at that moment; all else is the same.

    Bytes: 1 + 4/256 per element and moment in 8 bits and fp8, 1/2 + 4/128 in 4 bits, against 4.

    Args:
        module: Owns the parameters; used to name them.
        optimizer: AdamW, Adam (without ``amsgrad``) or SGD with momentum.
        bits: 8, 4 or "fp8"; see :mod:`lightning_memopt.techniques.blockwise`.
        engine: "memopt", "bitsandbytes" (8 bits) or "torchao" (no SGD).

    Returns:
        A handle whose ``remove()`` unpacks the state and puts everything back.

    Raises:
        ValueError: ``bits`` or ``engine`` is unknown, the optimizer is not one of those or has options that the
            engine does not have, gradients are sparse, or parameters are complex.
        ModuleNotFoundError: The library of ``engine`` is missing.

    Example:
        >>> net = nn.Linear(128, 64)
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> handle = hold_low_bit_state(net, optimizer, bits=8)
        >>> net(torch.ones(4, 128)).sum().backward()
        >>> optimizer.step()
        >>> state_bytes(optimizer) < 0.3 * 2 * sum(p.nbytes for p in net.parameters())
        True
        >>> handle.remove()
    """
    stepper = _make_engine(engine, bits)
    _refuse_unsupported(module, optimizer)
    if problem := stepper.find_problem(optimizer):
        raise ValueError(problem)
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for path, parameter in module.named_parameters():
        is_here = parameter in stepped and not parameter.is_meta  # on the meta device: held by another stage
        if is_here and stepper.packs(parameter) and (problem := stepper.why_not(parameter)):
            raise ValueError(f"{path!r} {problem}")
    if problem := stepper.try_out(optimizer):
        raise ValueError(problem)
    return LowBitState(optimizer, stepper)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the state of ``optimizer``, packed or not."""

    def count(value: Any) -> int:
        if isinstance(value, dict):
            return sum(count(item) for item in value.values())
        return value.nbytes if isinstance(value, torch.Tensor) else 0

    return sum(count(state) for state in optimizer.state.values())


def _make_engine(name: EngineName, bits: Bits) -> Engine:
    check_engine(name, bits)
    if name == "memopt":
        return OwnEngine(bits)
    try:
        return BitsandbytesEngine(bits) if name == "bitsandbytes" else TorchaoEngine(bits)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"engine={name!r} needs {error.name}, which is not installed: pip install 'lightning-memopt[quantize]'",
            name=error.name,
        ) from error


class LowBitState:
    """The handle of :func:`hold_low_bit_state`."""

    def __init__(self, optimizer: Optimizer, engine: Engine) -> None:
        self._optimizer = optimizer
        self._engine = engine
        self._pack_all()
        replace_step(optimizer, self._step_parameter)
        self._undo_patch = self._patch_step()
        self._hooks = (
            optimizer.register_state_dict_post_hook(_unpack_shards),
            optimizer.register_load_state_dict_pre_hook(_wrap_packed),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        )

    def remove(self, unpack: bool = True) -> None:
        """Put the optimizer back.

        Args:
            unpack: Bring the state back to the type that it was made in, so that the optimizer can go on. Without it
                (where memory has run out) the optimizer can only be saved.
        """
        self._undo_patch()
        replace_step(self._optimizer, None)
        if not unpack:
            return
        for hook in self._hooks:
            hook.remove()
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                if packed := as_packed(value):
                    state[key] = _unpack_whole(packed, parameter)

    def _patch_step(self) -> Callable[[], None]:
        """Let ``optimizer.step`` step packed parameters, from within: its own hooks run around it, once."""
        optimizer = self._optimizer
        patched = optimizer.__dict__.get("step")  # a learning-rate scheduler's
        inner = optimizer.step

        @wraps(inner)
        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            stepped: dict[torch.Tensor, torch.Tensor] = {}
            try:
                return inner(closure=partial(self._run_and_step, closure, stepped))
            finally:
                for parameter, gradient in stepped.items():
                    parameter.grad = gradient

        def undo() -> None:
            if patched is None:
                optimizer.__dict__.pop("step", None)
            else:
                optimizer.__dict__["step"] = patched

        optimizer.__dict__["step"] = MethodType(step, optimizer)
        return undo

    @torch.no_grad()
    def _run_and_step(self, closure: Callable[[], Any] | None, stepped: dict[torch.Tensor, torch.Tensor]) -> Any:
        """Run the closure, then step each large parameter and hide its gradient from the optimizer's own loop."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for index, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None and self._engine.packs(parameter):
                    step_one(self._optimizer, parameter, index)
                    stepped[parameter], parameter.grad = parameter.grad, None
        return loss

    def _step_parameter(self, optimizer: Optimizer, parameter: torch.Tensor, group_index: int) -> None:
        group = optimizer.param_groups[group_index]
        if parameter.grad is None or not self._engine.packs(parameter):
            step_alone(optimizer, parameter, group)
            return
        local = local_of(parameter)
        values, gradients = local.reshape(-1), local_gradient(parameter).reshape(-1)
        state = optimizer.state[parameter]
        optimizer.state[parameter] = self._engine.step(optimizer, values, gradients, state, group)
        if not local.is_contiguous():  # values was a copy
            local.copy_(values.view(local.shape))

    @torch.no_grad()
    def _pack_all(self) -> None:
        codec = self._engine.codec
        for parameter, state in self._optimizer.state.items():
            is_packed = self._engine.packs(parameter)
            for key in SIGNED.keys() & state.keys():
                packed = as_packed(state[key])
                if packed is not None and is_packed and packed["format"] == codec.format_name:
                    continue
                value = _unpack_whole(packed, parameter) if packed else state[key]
                state[key] = codec.pack(local_of(value), SIGNED[key]) if is_packed and value is not None else value

    def _after_load(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, _Loading):
                    packed, device = value.packed, parameter.device
                    moved = {"codes": packed["codes"].to(device), "scales": packed["scales"].to(device)}
                    state[key] = _part_of_whole(cast(PackedTensor, {**packed, **moved}), parameter)
        self._pack_all()
        if problem := self._engine.find_problem(optimizer):  # the groups' options are loaded too
            raise ValueError(problem)


class _Loading:
    """Hides a packed tensor from ``load_state_dict``, which would cast its codes to the parameter's type."""

    def __init__(self, packed: PackedTensor) -> None:
        self.packed = packed


def _wrap_packed(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        index: {key: _Loading(packed) if (packed := as_packed(value)) else value for key, value in values.items()}
        for index, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _unpack_shards(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """One after the other, and to the CPU: together they would take what packing them saves."""
    saved = (key for group in state_dict["param_groups"] for key in group["params"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {key: p for key, p in zip(saved, parameters, strict=True) if isinstance(p, DTensor)}
    state = {
        key: {
            name: _unpack_whole(packed, shards[key]).cpu() if (packed := as_packed(value)) else value
            for name, value in values.items()
        }
        if key in shards
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _unpack_whole(packed: PackedTensor, parameter: torch.Tensor) -> torch.Tensor:
    """Like ``parameter``, of which ``packed`` is all that this rank holds."""
    local = local_of(parameter)
    return like_shard(_unpack(packed, local.shape), parameter)


def _part_of_whole(packed: PackedTensor, parameter: torch.Tensor) -> PackedTensor | torch.Tensor:
    """What this rank holds of what a checkpoint has packed of all of ``parameter``."""
    if not isinstance(parameter, DTensor):
        return packed
    whole = _unpack(packed, parameter.shape)
    return shards_of_whole(whole, parameter.device_mesh, parameter.placements)


def _unpack(packed: PackedTensor, shape: torch.Size) -> torch.Tensor:
    """What is saved so and packed again is what it was."""
    codec = BlockwiseCodec(packed["format"])  # type: ignore[arg-type]
    return codec.unpack(packed, 0, shape.numel(), reproducibly=True).to(packed["dtype"]).view(shape)


def _refuse_unsupported(module: nn.Module, optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    possible = f"Possible are {', '.join(kind.__name__ for kind in SUPPORTED)} with momentum."
    if not isinstance(optimizer, SUPPORTED):
        raise ValueError(
            f"The optimizer is {name}, whose state cannot be held in few bits: what each of its tensors means is "
            f"not known here. {possible}"
        )
    base = next(kind for kind in SUPPORTED if isinstance(optimizer, kind))
    # Unwrapped, as torch wraps the step of each class of which an optimizer is made.
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(base.step):
        raise ValueError(
            f"The optimizer is {name}, based on {base.__name__} with a step of its own, which would be called for "
            f"parameters piece by piece. Use {base.__name__} itself."
        )
    for index, group in enumerate(optimizer.param_groups):
        if group.get("amsgrad"):
            raise ValueError(
                f"Group {index} of {name} has amsgrad=True: a running maximum of rounded numbers only creeps up. "
                "Set amsgrad=False."
            )
        if isinstance(optimizer, SGD) and not group["momentum"]:
            raise ValueError(
                f"Group {index} of {name} has momentum=0, so it keeps no state that could be held in few bits. "
                f"{possible}"
            )
    for path, child in module.named_modules():
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse:
            raise ValueError(
                f"{path!r} has sparse=True: a sparse gradient updates single rows, and state is packed in blocks "
                "across rows. Set sparse=False."
            )
    for path, parameter in module.named_parameters():
        if parameter.is_complex() and parameter.numel() >= SMALLEST:
            raise ValueError(
                f"{path!r} is complex ({parameter.dtype}): the levels that state is rounded to are real. Keep its "
                "real and imaginary parts in a real parameter (torch.view_as_complex in the forward)."
            )
