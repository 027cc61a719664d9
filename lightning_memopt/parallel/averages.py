"""Averages of weights where ranks hold parts of a module: each rank averages what it holds, element by element."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_memopt.parallel.agreement import broadcast_module_states
from lightning_memopt.parallel.gather import cut_like
from lightning_memopt.parallel.local import like_shard, local_of


def hold_parts_like(average: nn.Module, module: nn.Module) -> None:
    """Put what this rank holds of ``average``, by the measure of ``module``, in place of its whole parameters.

    They stay on their device and of their type. Those that other ranks hold, and buffers, go to the meta device. Tied
    parameters stay tied. All ranks must call this together; rank 0's values are taken.

    Args:
        average: A copy of ``module`` with whole parameters.
        module: Of which ranks hold shards or parts.

    Raises:
        ValueError: ``average`` is a copy of a module that had no values.
    """
    broadcast_module_states(average)
    parts: dict[nn.Parameter, nn.Parameter] = {}
    held = dict(module.named_parameters(remove_duplicate=False))
    for prefix, owner in average.named_modules():
        for name, whole in list(owner.named_parameters(prefix, recurse=False, remove_duplicate=False)):
            if whole.is_meta and not held[name].is_meta:
                raise ValueError(
                    f"The average of `{name}` has no values: the module was copied, to be averaged, when it was on "
                    "the meta device. Build it with real values, or leave the average out."
                )
            if whole not in parts:
                parts[whole] = _part_like(whole, held[name])
            setattr(owner, name.rpartition(".")[2], parts[whole])
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            prefix, _, key = name.rpartition(".")
            setattr(average.get_submodule(prefix), key, buffer)


def _part_like(whole: nn.Parameter, held: nn.Parameter) -> nn.Parameter:
    part = cut_like(whole.detach(), held)
    if isinstance(part, DTensor):  # which views the whole, and would keep it alive
        part = like_shard(local_of(part).to(whole.device, copy=True), held)
    return nn.Parameter(part, requires_grad=whole.requires_grad)


@contextmanager
def local_parameters(*modules: nn.Module) -> Iterator[None]:
    """Within the block shards and parts are plain tensors of what this rank holds, in the same memory and as tied."""
    owners = [owner for module in modules for owner in module.modules()]
    before = [dict(owner._parameters) for owner in owners]
    locals_: dict[nn.Parameter, nn.Parameter] = {}
    for owner in owners:
        for name, parameter in owner._parameters.items():
            if isinstance(parameter, DTensor):
                if parameter not in locals_:
                    locals_[parameter] = nn.Parameter(local_of(parameter), requires_grad=parameter.requires_grad)
                owner._parameters[name] = locals_[parameter]
    try:
        yield
    finally:
        for owner, parameters in zip(owners, before, strict=True):
            owner._parameters.update(parameters)


def cut_what_is_loaded(module: nn.Module) -> Callable[[], Any]:
    """Let ``module.load_state_dict`` take whole tensors for the shards and parts that it has.

    Returns:
        What takes the hook off again.
    """
    return module.register_load_state_dict_pre_hook(_cut).remove


def _cut(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, like in module.state_dict(prefix=prefix, keep_vars=True).items():
        if name in state and not isinstance(state[name], DTensor):
            state[name] = cut_like(state[name], like)
