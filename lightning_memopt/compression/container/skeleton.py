"""Describe how a module is built, and build it again without its weights."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.compression.container.errors import CompressedFileError
from lightning_memopt.compression.container.tensors import DTYPES, type_name
from lightning_memopt.compression.container.values import from_json, to_json
from lightning_memopt.compression.first_sizes import first_sizes, remember_sizes
from lightning_memopt.compression.model_config import is_model_config
from lightning_memopt.models.class_names import class_name

Attributes = dict[str, Any]


def describe(module: nn.Module) -> dict[str, Any]:
    """The class of ``module``, its hyper-parameters, and what a module so built has not.

    A shrunk module differs from what its class builds in sizes that modules keep as plain attributes
    (``in_features``, ``num_heads``). Where nothing can be built to compare with, those of all modules with parameters
    are recorded, and of one that was made smaller the integers of the others.
    """
    cls = type(module)
    arguments = _arguments(module)
    fresh = _build_on_meta(cls, arguments)
    others = {} if fresh is None else dict(fresh.named_modules())
    edits: dict[str, Any] = {}
    seen: set[int] = set()
    for name, part in module.named_modules():
        recorded = _plain_attributes(part)
        if fresh is None:
            changed = bool(part._parameters)
            if not changed and first_sizes(module):  # whose numbers of heads and widths are others now
                recorded = {key: value for key, value in recorded.items() if type(value) is int}
                changed = bool(recorded)
        else:
            known = _plain_attributes(others[name]) if name in others else {}
            recorded = {key: value for key, value in recorded.items() if key not in known or known[key] != value}
            changed = bool(recorded) or name not in others or _shapes(part) != _shapes(others[name])
        if changed:
            edits[name] = {"attributes": {key: to_json(value) for key, value in recorded.items()}}
        if sizes := _changed_config(part, others.get(name), seen):
            edits.setdefault(name, {"attributes": {}})["config"] = sizes
    described = {"class": class_name(cls), "arguments": arguments, "edits": edits}
    if (other := _first_other(module, others)) is not None:
        described["other"] = other
    if units := first_sizes(module):  # so that the share of structured pruning stays a target
        described["units"] = units
    if types := _changed_types(module, None if fresh is None else others):
        described["types"] = types
    return described


def build(manifest: Mapping[str, Any], module: nn.Module | Callable[[], nn.Module] | None) -> nn.Module:
    """The module to load into: ``module``, what it returns, or one of the manifest's class; edited as recorded.

    Raises:
        CompressedFileError: The class cannot be imported, is no module, or cannot be built; an edit does not apply.
    """
    if module is None:
        skeleton = _from_manifest(manifest)
    else:
        skeleton = module if isinstance(module, nn.Module) else module()
        if not isinstance(skeleton, nn.Module):
            raise ValueError(f"`module` made a {type(skeleton).__name__}, which is no nn.Module.")
    _configure(skeleton)
    for name, edit in manifest["edits"].items():
        _edit(skeleton, name, edit)
    if units := manifest.get("units"):
        if not isinstance(units, dict) or not all(type(size) is int and size > 0 for size in units.values()):
            raise CompressedFileError(f"The units that groups had at first are {units!r}, which are no numbers.")
        remember_sizes(skeleton, units)
    _change_types(skeleton, manifest.get("types", {}))
    return skeleton


def _from_manifest(manifest: Mapping[str, Any]) -> nn.Module:
    path, arguments, other = (manifest.get(key) for key in ("class", "arguments", "other"))
    advice = "Give `module`, one built as that which was saved: `load_compressed(path, module=...)`."
    if not isinstance(path, str) or path.count(":") != 1 or "<" in path:
        raise CompressedFileError(f"The class {path!r} cannot be imported. {advice}")
    if not isinstance(arguments, dict):
        raise CompressedFileError(
            f"The hyper-parameters of {path} were not saved: they are not plain values. {advice}"
        )
    if other is not None:
        name, had, made = other if isinstance(other, list) and len(other) == 3 else ["?"] * 3
        raise CompressedFileError(
            f"{path} builds {made} as `{name}`, where the saved one had {had}: its hyper-parameters were not all "
            f"saved. {advice}"
        )
    home, _, qualified = path.partition(":")
    try:
        cls: Any = import_module(home)
        for part in qualified.split("."):
            cls = vars(cls)[part]
    except Exception as error:  # importing runs whatever that module does
        raise CompressedFileError(f"The class {path} cannot be imported ({error!r}). {advice}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CompressedFileError(f"{path} is no class of nn.Module, so nothing is built from it.")
    try:
        return cls(**from_json(arguments))
    except Exception as error:
        raise CompressedFileError(
            f"{path} cannot be built from its hyper-parameters ({error!r}). {advice}"
        ) from error


def _first_other(module: nn.Module, fresh: Mapping[str, nn.Module]) -> list[str] | None:
    """The first submodule for which the constructor makes another class: its name, its class, and what is made."""
    for name, part in module.named_modules():
        had, made = type(part).__name__, type(fresh.get(name, part)).__name__
        is_synced = had == "SyncBatchNorm" and made.startswith("BatchNorm")  # by the trainer, and the same alone
        if name and had != made and not is_synced:
            return [name, had, made]
    return None


def _changed_config(part: nn.Module, fresh: nn.Module | None, seen: set[int]) -> Attributes:
    """Integers in the config of a model from which another was built, or all where none could be."""
    config = getattr(part, "config", None)
    if not is_model_config(config) or id(config) in seen:
        return {}
    seen.add(id(config))
    known = vars(fresh.config) if fresh is not None else {}
    return {key: value for key, value in vars(config).items() if type(value) is int and known.get(key) != value}


def _build_on_meta(cls: type[nn.Module], arguments: Any) -> nn.Module | None:
    """A module of ``cls`` without memory, or ``None`` where that cannot be had."""
    if not isinstance(arguments, dict):
        return None
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            module = cls(**from_json(arguments))
            _configure(module)
            return module
    except Exception:  # constructors that read values, or need more than hyper-parameters
        return None


def _configure(module: nn.Module) -> None:
    configure = getattr(module, "configure_model", None)  # Lightning's hook for layers built late
    if callable(configure):
        configure()


def _arguments(module: nn.Module) -> Any:
    """What ``save_hyperparameters`` kept of the arguments of the constructor; ``None`` where JSON cannot hold it."""
    known = dict(getattr(module, "hparams", None) or {})
    signature = inspect.signature(type(module)).parameters
    name = getattr(module, "_hparams_name", None)
    if name and name in signature and name not in known and name != "kwargs":
        known = {name: known}
    elif not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        known = {key: value for key, value in known.items() if key in signature}
    try:
        written = to_json(known)
        return written if from_json(json.loads(json.dumps(written, allow_nan=False))) == known else None
    except (TypeError, ValueError):
        return None


def _unsaved(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers that no file has, by their names in ``module``, one of its own parts."""
    held = {name: module._buffers.get(name) for name in sorted(module._non_persistent_buffers_set)}
    return {name: tensor for name, tensor in held.items() if tensor is not None and tensor.is_floating_point()}


def _changed_types(module: nn.Module, fresh: Mapping[str, nn.Module] | None) -> dict[str, str]:
    """Types that buffers without a file have after the module was converted, as by ``.bfloat16()``, by full names."""
    types = {}
    for name, part in module.named_modules():
        made = {} if fresh is None or name not in fresh else _unsaved(fresh[name])
        for key, tensor in _unsaved(part).items():
            if tensor.dtype != (made[key].dtype if key in made else torch.float32):
                full = f"{name}.{key}" if name else key
                types[full] = type_name(full, tensor)
    return types


def _change_types(skeleton: nn.Module, types: Any) -> None:
    for name, dtype in types.items() if isinstance(types, dict) else [("types", types)]:
        owner, _, key = name.rpartition(".")
        part = dict(skeleton.named_modules()).get(owner)
        known = DTYPES.get(dtype) if isinstance(dtype, str) else None
        if part is None or key not in _unsaved(part) or known is None or not known.is_floating_point:
            raise CompressedFileError(f"`{name}` is to become {dtype!r}, and is no buffer that can.")
        part._buffers[key] = _unsaved(part)[key].to(known)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor.shape for name, tensor in held.items() if tensor is not None}


def _plain_attributes(module: nn.Module) -> Attributes:
    names = (name for name in vars(module) if not name.startswith("_") and name != "training")
    return {name: value for name in names if _is_plain(value := vars(module)[name])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return type(value) is tuple and all(map(_is_plain, value))
    return type(value) in (int, bool, str) or (type(value) is float and math.isfinite(value))


def _edit(skeleton: nn.Module, name: str, edit: Any) -> None:
    attributes, sizes = (edit.get("attributes"), edit.get("config", {})) if isinstance(edit, dict) else (None, None)
    is_known = set(edit) <= {"attributes", "config"} if isinstance(edit, dict) else False
    if not is_known or not isinstance(attributes, dict) or not isinstance(sizes, dict):
        raise CompressedFileError(f"The edit of `{name}` is {edit!r}, which this version does not know.")
    try:
        part = skeleton.get_submodule(name)
    except AttributeError as error:
        raise CompressedFileError(
            f"{type(skeleton).__name__} has no module `{name}`, which the saved one had; give one built as it was."
        ) from error
    for key, value in attributes.items():
        old = vars(part).get(
            key, getattr(type(part), key, None)
        )  # or of the class: nothing may take a method's place
        is_held = key in part._parameters or key in part._buffers or key in part._modules
        if key.startswith("_") or is_held or not (old is None or _is_plain(old)):
            raise CompressedFileError(f"`{name}.{key}` is not a plain attribute, so it is not set.")
        if not _is_plain(value := from_json(value)):
            raise CompressedFileError(f"`{name}.{key}` is to be {value!r}, which is no plain value.")
        setattr(part, key, value)
    config = getattr(part, "config", None)
    for key, value in sizes.items():
        known = vars(config).get(key, "nothing") if is_model_config(config) else "nothing"
        if not (known is None or type(known) is int) or type(value) is not int:
            raise CompressedFileError(f"`{name}.config.{key}` is no size of a model, so it is not set.")
        setattr(config, key, value)
