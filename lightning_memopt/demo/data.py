"""Real text that every machine has: the source of Python's own standard library, as bytes."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

HELD_OUT_EVERY = 10
"""Each tenth file is held out. The split is by file, so that no held-out line has neighbours in training."""


@dataclass(frozen=True)
class Corpus:
    """The text, split by file.

    Attributes:
        training: Bytes of the training files, one after another, ``(bytes,)``, uint8.
        held_out: Bytes of the held-out files, likewise.
        files: How many files there are in each, in that order.
    """

    training: Tensor
    held_out: Tensor
    files: tuple[int, int]


def standard_library(folder: Path | None = None) -> Corpus:
    """Read the top-level modules of the standard library, in the order of their names.

    Args:
        folder: Where to read ``*.py`` from instead of the running interpreter's library.

    Raises:
        ValueError: The folder holds too few source files, as where the library is shipped in compiled form.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    paths = sorted(folder.glob("*.py"))
    if len(paths) < HELD_OUT_EVERY:
        raise ValueError(
            f"{folder} holds {len(paths)} Python source files, and the text of the demo is the source of the "
            "standard library; use a Python that is installed with its sources"
        )
    held_out = paths[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [path for path in paths if path not in set(held_out)]
    return Corpus(_read(training), _read(held_out), (len(training), len(held_out)))


class Windows(Dataset[Tensor]):
    """Windows of ``length`` bytes at random places, drawn once from a seed, so that each epoch and run sees the same.

    Args:
        text: ``(bytes,)``, uint8.
        length: Bytes in one window.
        count: How many windows.
        seed: Seed of their places.

    Raises:
        ValueError: The text is shorter than one window.
    """

    def __init__(self, text: Tensor, length: int, count: int, seed: int) -> None:
        if len(text) < length:
            raise ValueError(f"the text has {len(text)} bytes, and one window needs {length}")
        generator = torch.Generator().manual_seed(seed)
        self.text = text
        self.length = length
        self.starts = torch.randint(len(text) - length + 1, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + self.length].long()


def _read(paths: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)
