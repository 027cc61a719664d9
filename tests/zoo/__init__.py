"""Small LightningModules written the way users write them, random-init, seconds to train.

``ZOO`` maps a name to an :class:`Entry`. ``entry.build()`` makes the module with the same weights each time,
``entry.loader(...)`` a plain DataLoader over a fixed synthetic dataset.
"""

from collections.abc import Collection
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
    return [
        pytest.param(name, marks=pytest.mark.slow if name in LARGER else ())
        for name, entry in ZOO.items()
        if name not in without and (entry.automatic or not only_automatic)
    ]


__all__ = ["ZOO", "Entry", "cases"]
