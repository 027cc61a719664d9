"""Small LightningModules written the way users write them, random-init, seconds to train.

``ZOO`` maps a name to an :class:`Entry`. ``entry.build()`` makes the module with the same weights each time,
``entry.loader(...)`` a plain DataLoader over a fixed synthetic dataset.
"""

from collections.abc import Collection, Container, Iterable
from typing import Any

import pytest

from tests.zoo.entry import Entry
from tests.zoo.plain import PLAIN
from tests.zoo.text import TEXT
from tests.zoo.vision import VISION

ZOO: dict[str, Entry] = {entry.name: entry for entry in (*PLAIN, *TEXT, *VISION)}

LARGER = ("t5", "mamba", "vit", "captioner", "llama", "bert_qa")


def cases(without: Collection[str] = (), only_automatic: bool = False) -> list[Any]:
    """Names for ``parametrize``; the larger modules are marked slow, and so left to a release."""
    return slow_where(
        [n for n, entry in ZOO.items() if n not in without and (entry.automatic or not only_automatic)], LARGER
    )


def slow_where(values: Iterable[Any], slow: Container[Any] = LARGER) -> list[Any]:
    """``values`` for ``parametrize``, those in ``slow`` left to a release: a quick one shows what they do."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow if value in slow else ()
        )
        for value in values
    ]


__all__ = ["LARGER", "ZOO", "Entry", "cases", "slow_where"]
