"""Build the LightningModule of a checkpoint: of the class that the user names, or of the one that was recorded."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_memopt.checkpoints.sharded import is_sharded
from lightning_memopt.models.class_names import CLASS, NOTE, is_importable
from lightning_memopt.planning.load import load_object

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
_HEADERS = ("# lightning.pytorch==", "# pytorch_lightning==")
"""How files begin that LightningCLI writes: other tools have a ``config.yaml`` with a ``model`` too."""
_INSTANTIATORS = (_INSTANTIATOR, "pytorch_lightning.cli.instantiate_module")
"""Functions of Lightning's that a checkpoint of LightningCLI names to build its module; no others are called."""


def load_module(checkpoint: str, name: str | None = None) -> pl.LightningModule:
    """The module of ``checkpoint`` with its weights, on the CPU and in evaluation mode.

    Only tensors and plain values are unpickled. The class is looked for in ``name``, then in the checkpoint, where
    callbacks of this package and LightningCLI record it, then in the ``config.yaml`` that LightningCLI writes beside
    it. Importing a class runs the file that it is in, of yours or of what is installed: give ``name`` for a
    checkpoint from someone whom you do not trust.

    Args:
        checkpoint: A file that Lightning saved.
        name: The class, as ``"package.module:Class"``; preferred to what is recorded. ``None``: the recorded one.

    Raises:
        ValueError: It is no whole checkpoint, does not name its class, the class is no LightningModule, or the
            weights do not fit what it builds.
        OSError: It cannot be read.
    """
    content = _read(checkpoint)
    hyper_parameters = content.get("hyper_parameters") or {}
    instantiator = hyper_parameters.get("_instantiator", _INSTANTIATOR)
    if instantiator not in _INSTANTIATORS:
        raise ValueError(
            f"{checkpoint} is to be built by {instantiator!r}, which is no part of Lightning: not called"
        )
    config = _config_of_cli(checkpoint)
    name = name or _recorded(checkpoint, content, config)
    cls = load_object(name)
    if not (isinstance(cls, type) and issubclass(cls, pl.LightningModule)):
        raise ValueError(f"{name} is no LightningModule; name the class that the checkpoint was saved from")
    more = _arguments_of_cli(cls, hyper_parameters, config)
    try:
        return cls.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, **more).eval()
    except Exception as error:  # whatever the user's constructor raises
        said = " ".join(str(error).split())
        smaller = (
            ". One that structured pruning made smaller is kept by export_path= and save_compressed, and read by "
            "load_compressed"
            if "size mismatch" in said
            else ""
        )
        raise ValueError(
            f"{checkpoint} does not load into {name} ({type(error).__name__}: {said}); name the class that it was "
            f"saved from, which has to call save_hyperparameters where it takes arguments{smaller}"
        ) from error


def _read(checkpoint: str) -> Mapping[str, Any]:
    """What the checkpoint holds, with tensors that have no values."""
    if is_sharded(checkpoint):
        raise ValueError(f"{checkpoint} is sharded; make one file of it: lightning-memopt consolidate DIR FILE")
    try:
        content = torch.load(checkpoint, map_location="meta", weights_only=True)
    except (UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{checkpoint} is no whole checkpoint of tensors and plain values, and nothing else is loaded, since it "
            f"could run code: {str(error).splitlines()[0] if str(error) else 'the file ends early'}"
        ) from error
    held = content if isinstance(content, dict) else {}
    if lacking := [key for key in ("state_dict", "pytorch-lightning_version") if key not in held]:
        raise ValueError(f"{checkpoint} is no checkpoint that Lightning saved: it has no {' and no '.join(lacking)}")
    return content


def _recorded(checkpoint: str, content: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class as ``"package.module:Class"``, of all that is recorded the first that can be imported here."""
    names = list(_names(content, config))
    for name in names:
        if is_importable(name):
            return name
    reason = f"names {names[0]}, which the script that was run defined," if names else "does not name its class"
    raise ValueError(
        f"{checkpoint} {reason} and nobody else knows where that is: name it with --module package.module:Class, or "
        "as `module: package.module:Class` in the recipe"
    )


def _names(content: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    note = content.get(NOTE)
    if isinstance(note, dict) and isinstance(name := note.get(CLASS), str):
        yield name
    for recorded in ((content.get("hyper_parameters") or {}).get("_class_path"), config.get("class_path")):
        if isinstance(recorded, str):
            yield ":".join(recorded.rsplit(".", 1))


def _config_of_cli(checkpoint: str) -> Mapping[str, Any]:
    """The module's part of the ``config.yaml`` that LightningCLI writes to a run's folder; empty where none is."""
    import yaml

    folder = Path(checkpoint).resolve().parent
    file = next((file for above in (folder, folder.parent) if (file := above / "config.yaml").is_file()), None)
    if file is None:
        return {}
    try:
        text = file.read_text()
        content = yaml.safe_load(text) if text.startswith(_HEADERS) else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    model = content.get("model") if isinstance(content, dict) else None
    return model if isinstance(model, dict) else {}


def _arguments_of_cli(cls: type, hyper_parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What Lightning is to be told beside what the checkpoint says of how ``cls`` is built."""
    # The name that was saved may be another, as of the script that was run.
    named = {"_class_path": f"{cls.__module__}.{cls.__name__}"} if "_class_path" in hyper_parameters else {}
    if not config or config.get("class_path", cls.__name__).rpartition(".")[2] != cls.__name__:
        return named
    is_subclass = "class_path" in config
    arguments = {**(config.get("init_args") or {}), **(config.get("dict_kwargs") or {})} if is_subclass else config
    # Of a checkpoint that has hyperparameters those are missing that save_hyperparameters was told to ignore.
    missing = {key: value for key, value in arguments.items() if key not in hyper_parameters}
    saved = {key for key in hyper_parameters if not key.startswith("_")}
    if hyper_parameters and not (missing and saved <= arguments.keys()):
        return named
    return {**missing, **named, "_instantiator": _INSTANTIATOR}
