"""Random numbers of a step that runs on several stages: what it draws in front of its blocks is alike on all."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch._guards import active_fake_mode


class RandomStreams:
    """Deals out random numbers to the runs of a user's step, of which each stage makes one for each micro-batch.

    A step that adds noise to its batch, masks tokens or mixes samples does so on every stage, and the last one
    compares with what the first one made: all begin a micro-batch with the same numbers of torch, Python and numpy.
    Where a stage's own links begin it goes on with numbers of its own, so that no two stages drop out alike. With one
    micro-batch what torch draws in front of the blocks is what it draws on one device.

    Args:
        group: The ranks of the pipeline.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._common = b""  # torch's state, in which the first micro-batch of a batch begins
        self._digest = b""
        self._is_in_front = False
        self._drawn: bytes | None = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within the block, which runs a batch, numbers are of steps; loaders, outside of it, draw on from theirs.

        All ranks of the pipeline enter it together.
        """
        outside = _state()
        self._common = self._next() if self._common else self._of_first_rank(outside)
        self._digest = hashlib.blake2b(self._common).digest()
        try:
            with python_and_numpy_kept():
                yield
        finally:
            _set_state(outside)

    def begin(self, index: int) -> None:
        """Before a stage runs the step on micro-batch ``index``."""
        self._seed(0, index)
        if index == 0:
            _set_state(self._common)
        self._is_in_front = index == 0

    def begin_own(self, stage: int, index: int) -> None:
        """Where the links of a stage begin, in its forward and where that is computed again."""
        if self._is_in_front:
            state = _state()
            self._drawn, self._is_in_front = None if state == self._common else state, False
        self._seed(stage, index)

    @property
    def drawn(self) -> bytes | None:
        """On the last stage, after a batch: what :meth:`go_on_from` is to be told on all ranks."""
        return self._drawn

    def go_on_from(self, drawn: bytes | None) -> None:
        """After a batch, on all ranks; ``None`` where its steps drew nothing in front of the last stage."""
        self._drawn = drawn

    def _next(self) -> bytes:
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            return drawn
        # The first stage may have drawn, to drop out between its embeddings and its blocks.
        torch.default_generator.manual_seed(int.from_bytes(self._digest[:8], "little"))
        return _state()

    def _of_first_rank(self, state: bytes) -> bytes:
        if active_fake_mode() is not None:  # a run that is predicted, on one rank
            return state
        told = [state]
        dist.broadcast_object_list(told, src=dist.get_global_rank(self._group, 0), group=self._group)
        return told[0]

    def _seed(self, *numbers: int) -> None:
        # Hashed, since the generator of the CPU looks at 32 bits alone.
        hashed = hashlib.blake2b(self._digest + repr(numbers).encode(), digest_size=8).digest()
        seed = int.from_bytes(hashed, "little")
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)


@contextmanager
def python_and_numpy_kept() -> Iterator[None]:
    """Afterwards the generators of Python and numpy are where they were."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


def _state() -> bytes:
    """Of torch's generator for the CPU; no tensor, which would be counted in what the step takes."""
    return torch.get_rng_state().numpy().tobytes()


def _set_state(state: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
