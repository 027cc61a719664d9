"""Read how many heads an attention module has, whatever its author calls them."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "nheads", "heads", "num_head")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "d_head", "head_size", "d_kv")


@dataclass(frozen=True)
class Heads:
    """The heads of an attention module.

    Attributes:
        queries: Number of query heads.
        keys: Number of key and value heads; fewer than ``queries`` under grouped-query attention.
        size: Features of one head.
    """

    queries: int
    keys: int
    size: int

    @property
    def width(self) -> int:
        """Features of all query heads together."""
        return self.queries * self.size


def read_heads(module: nn.Module, width: int | None = None) -> Heads | None:
    """The heads of the attention in ``module``, from its attributes, its submodules', or their ``config``'s.

    Args:
        module: An attention module, or the parent of its parts (BERT's ``attention`` holds ``self`` and ``output``).
        width: Features of all query heads together, for a module that does not say how large a head is.

    Returns:
        ``None`` if nothing in ``module`` says how many heads it has.
    """
    places: list[object] = list(module.modules())
    configs = {id(config): config for place in places if (config := getattr(place, "config", None)) is not None}
    places += configs.values()
    queries = _first(places, HEADS)
    if queries is None:
        return None
    size = _first(places, _HEAD_SIZES)
    if size is None:
        if width is None or width % queries:
            return None
        size = width // queries
    return Heads(queries, _first(places, KEY_VALUE_HEADS) or queries, size)


def _first(places: Iterable[object], names: tuple[str, ...]) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
