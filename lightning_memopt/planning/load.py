"""Find a module and a batch by the names that a user types."""

import inspect
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch


def load_object(path: str) -> Any:
    """What ``"package.module:Name"`` (or ``"package.module:Class.Name"``) names.

    The folder that the user is in is looked in too.

    Raises:
        ValueError: There is no such module or no such name in it.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{path!r} names nothing to import; write it as package.module:Name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{module_name!r} cannot be imported ({error}); give a module of the Python path") from error
    try:
        return attrgetter(name)(module)
    except AttributeError:
        public = [each for each in vars(module) if not each.startswith("_")]
        raise ValueError(f"{module_name} has no {name!r}; it has {', '.join(public[:12])}") from None


def check_arguments(path: str, named: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that what ``path`` names does not take, before it is called.

    Raises:
        ValueError: It takes others, or cannot be called.
    """
    if not callable(named):
        raise ValueError(f"{path} is a {type(named).__name__}, which makes nothing; name a class or a function")
    try:
        signature = inspect.signature(named)
    except ValueError:  # of a class in C, which says nothing
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no arguments"
        raise ValueError(f"{path} cannot be called with these arguments ({error}); it takes {takes}") from error


def load_batch(path: str, arguments: dict[str, Any]) -> Any:
    """The first training batch of a data module, of a loader, or what a function returns.

    Raises:
        ValueError: ``path`` names nothing, does not take ``arguments``, or there is no batch.
    """
    make = load_object(path)
    check_arguments(path, make, arguments)
    made = make(**arguments)
    if isinstance(made, pl.LightningDataModule):
        made.prepare_data()
        made.setup("fit")
        made = made.train_dataloader()
    is_loader = hasattr(made, "__iter__") and not hasattr(made, "keys")
    if is_loader and not isinstance(made, torch.Tensor | list | tuple):
        for batch in made:
            return batch
        raise ValueError(f"{path} has no batch; let it give at least one")
    return made
