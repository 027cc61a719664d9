"""Take FSDP2 off a module again: the adapter for what torch offers no public call for.

Reads private attributes of ``torch.distributed.fsdp._fully_shard`` and ``torch.distributed._composable``. Tried with
torch 2.13; 2.11 and 2.12 keep one parameter group per state in ``_fsdp_param_group``.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_memopt.parallel.gather import full_on_cpu


def unshard_in_place(module: nn.Module, gather: bool = True) -> None:
    """Undo every ``fully_shard`` below ``module``: classes, hooks, marks and, if ``gather``, parameters.

    Args:
        module: The module that was sharded.
        gather: Replace the shards with whole parameters on the CPU, one at a time, tied ones once. All ranks must
            call this together.
    """
    sharded: list[Any] = [submodule for submodule in module.modules() if isinstance(submodule, FSDPModule)]
    for submodule in sharded:
        submodule.reshard()
    for submodule in sharded:
        _remove_hooks(submodule)
    for submodule in sharded:
        cls = type(submodule)
        submodule.__class__ = cls.__mro__[cls._orig_cls_mro_index]
        _module_state_mapping.pop(submodule, None)
    for submodule in module.modules():
        for mark in (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(submodule).pop(mark, None)
    if gather:
        make_whole(module)


def _remove_hooks(submodule: Any) -> None:
    state = submodule._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    for group in parameter_groups(submodule):
        for handle in group._module_to_pre_save_state_dict_hook_handle.values():
            handle.remove()
        for handle in group._module_to_pre_load_state_dict_hook_handle.values():
            handle.remove()
        for parameter in group.fsdp_params:
            parameter._post_load_hook_handle.remove()  # it would hold the shards, and could not be pickled


def parameter_groups(submodule: Any) -> list[Any]:
    """What FSDP2 gathers and reduces together, of a module that it was put on."""
    state = submodule._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def make_whole(module: nn.Module) -> None:
    """Put whole parameters on the CPU in place of shards, one at a time, tied ones once; all ranks together."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in whole:
                value = full_on_cpu(parameter.detach())
                assert isinstance(value, torch.Tensor)
                whole[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(owner, name, whole[parameter])  # not `_parameters`: recurrent modules keep a list of their own
