"""Plain values as JSON holds them, and back."""

from typing import Any


def to_json(value: Any) -> Any:
    """``value`` with tuples as mappings, which they stay apart from lists by."""
    if isinstance(value, tuple):
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return {key: to_json(item) for key, item in value.items()} if isinstance(value, dict) else value


def from_json(value: Any) -> Any:
    """What :func:`to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"tuple"} and isinstance(value["tuple"], list):
        return tuple(map(from_json, value["tuple"]))
    return {key: from_json(item) for key, item in value.items()}
