"""Small LightningModules written the way users write them, random-init, seconds to train.

``ZOO`` maps a name to an :class:`Entry`. ``entry.build()`` makes the module with the same weights each time,
``entry.loader(...)`` a plain DataLoader over a fixed synthetic dataset. ``CASES`` are its names, for
what takes a while: the larger modules are left to a release.
"""

import pytest

from tests.zoo.entry import Entry
from tests.zoo.plain import PLAIN
from tests.zoo.text import TEXT
from tests.zoo.vision import VISION

ZOO: dict[str, Entry] = {entry.name: entry for entry in (*PLAIN, *TEXT, *VISION)}

LARGER = ("t5", "mamba", "vit", "captioner")
CASES = [pytest.param(name, marks=pytest.mark.slow if name in LARGER else ()) for name in ZOO]

__all__ = ["CASES", "ZOO", "Entry"]
