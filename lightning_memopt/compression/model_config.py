"""Bring the sizes in the config of a Hugging Face model up to date after its tensors were made smaller."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.compression.slots import UnitGroup

Kept = Sequence[tuple[UnitGroup, Tensor]]
"""Groups of units, and a mask of those that were kept."""

_INNER = ("intermediate", "inner", "ff", "mlp")

_NO_SIZES = ("vocab", "position", "image", "patch", "length", "window", "kernel", "chunk", "token", "label", "layers")
"""Parts of names of numbers that are of what goes in, or of how it is cut, and may only happen to be equal."""


def update_configs(module: nn.Module, kept: Kept, is_sound: Callable[[], bool]) -> dict[str, str]:
    """Write the new sizes into each config below ``module`` from which a model of these sizes can be built.

    A config has one number for all layers. Where layers were left with unequal numbers, or code derives one size from
    another that no longer follows, nothing built from it would fit, and it keeps the old sizes.

    Args:
        module: A module that was made smaller.
        kept: What of it.
        is_sound: Whether the module still computes what it should, since its code may read the config.

    Returns:
        Why a config keeps the old sizes, by its qualified name.
    """
    reasons = {}
    for name, model in _outermost(module):
        found, old = model.config, dict(vars(model.config))
        new = _new_values(old, [(group, mask) for group, mask in kept if _is_below(group.name, name)])
        trial = copy.deepcopy(found)
        vars(trial).update(new)
        reason = _why_not(model, trial)
        if not reason:
            vars(found).update(new)
            if is_sound():
                continue
            vars(found).update({key: old[key] for key in new})
            reason = "the module does not run with the new ones"
        reasons[f"{name}.config" if name else "config"] = f"keeps the old sizes: {reason}"
    return reasons


def is_model_config(config: Any) -> bool:
    """Whether ``config`` is one of Hugging Face's, of which plain attributes say how large a model is."""
    return any(
        base.__name__ == "PretrainedConfig" or base.__name__ == "PreTrainedConfig" for base in type(config).mro()
    )


def _outermost(module: nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for name, child in module.named_modules():
        config = getattr(child, "config", None)
        if is_model_config(config) and id(config) not in seen:
            seen.add(id(config))
            yield name, child


def _is_below(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _new_values(old: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """What integers become, by their names: counts of heads, sizes within layers, and the width between them."""
    heads, keys, inner, width = ({} for _ in range(4))  # type: ignore[var-annotated]
    for group, mask in kept:
        left = int(mask.sum())
        if group.heads is not None:
            repeated = group.heads.queries // group.heads.keys
            heads[group.heads.queries], keys[group.heads.keys] = left * repeated, left
        else:
            (width if group.kind == "width" else inner)[group.size] = left
    new: dict[str, Any] = {}
    for name, value in old.items():
        if type(value) is not int:
            continue
        if "head" in name and "dim" not in name and "size" not in name:
            sizes = keys if "key" in name or "kv" in name else heads
        else:
            sizes = inner if any(part in name for part in _INNER) else width
        if value in sizes and not any(part in name for part in _NO_SIZES):
            new[name] = sizes[value]
    if old.get("n_inner", 0) is None and len(set(inner.values())) == 1:  # GPT-2's: four times the width, if not said
        new["n_inner"] = next(iter(inner.values()))
    return new


def _why_not(model: nn.Module, config: Any) -> str:
    """Why a model built from ``config`` is not of the sizes of ``model``; empty where it is."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            fresh = type(model)(config)
    except Exception as error:
        return f"a model cannot be built from the new ones ({type(error).__name__}: {error})"
    shapes = {name: parameter.shape for name, parameter in fresh.named_parameters()}
    for name, parameter in model.named_parameters():
        if shapes.get(name) != parameter.shape:
            found = list(shapes[name]) if name in shapes else "missing"
            return f"{name} is {list(parameter.shape)} and would be {found} in a model that is built from one config"
    return ""
