"""What modules keep beside their tensors: ``get_extra_state`` and ``set_extra_state``."""

import json
from typing import Any

from torch import nn

from lightning_memopt.compression.container.errors import CompressedFileError
from lightning_memopt.compression.container.values import from_json, to_json


def read_extra(module: nn.Module) -> dict[str, Any]:
    """The extra state of each module below ``module`` that has one, by name, as JSON holds it.

    Raises:
        ValueError: JSON cannot hold one.
    """
    extra = {}
    for name, part in module.named_modules():
        if not _has_extra(part):
            continue
        state = part.get_extra_state()
        try:
            written = to_json(state)
            is_same = bool(from_json(json.loads(json.dumps(written, allow_nan=False))) == state)
        except (TypeError, ValueError, RuntimeError):  # the last of tensors, which are compared one by one
            is_same = False
        if not is_same:
            raise ValueError(
                f"`{name}` ({type(part).__name__}) has a get_extra_state() that is not plain: numbers, texts, lists, "
                "mappings. What is saved has no pickle: register tensors as buffers instead."
            )
        extra[name] = written
    return extra


def restore_extra(module: nn.Module, extra: Any) -> None:
    """Give modules below ``module`` what :func:`read_extra` read.

    Raises:
        CompressedFileError: It is not theirs.
    """
    parts = {name: part for name, part in module.named_modules() if _has_extra(part)}
    if not isinstance(extra, dict) or extra.keys() != parts.keys():
        raise CompressedFileError(
            f"The folder has extra state of {sorted(extra) if isinstance(extra, dict) else extra!r}, and "
            f"{type(module).__name__} of {sorted(parts)}. Give a module built as the one that was saved."
        )
    for name, state in extra.items():
        try:
            parts[name].set_extra_state(from_json(state))
        except Exception as error:  # of the user's own code
            raise CompressedFileError(f"`{name}` does not take its extra state ({error!r}).") from error


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
