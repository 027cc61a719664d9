"""Which rank failed, where and of what: from the signs of life that ranks give, and from errors that only echo it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from lightning_memopt.parallel.stack import Line


class RankFailure(RuntimeError):
    """A rank failed, and with it the training of all ranks; the same sentence on each of them.

    Attributes:
        rank: The rank that failed first.
        host: The host that it ran on.
        phase: What it last said it was doing, such as ``"backward of batch 17"``.
        cause: What is known of why.
    """

    def __init__(self, rank: int, host: str, phase: str, cause: str) -> None:
        super().__init__(rank, host, phase, cause)  # all of them, so that the error can be pickled
        self.rank, self.host, self.phase, self.cause = rank, host, phase, cause

    def __str__(self) -> str:
        return (
            f"Rank {self.rank} (host {self.host}) failed in {self.phase}: {self.cause}. The other ranks cannot go on "
            "without it and end too. Resume from the newest checkpoint with `ckpt_path='last'`."
        )


@dataclass(frozen=True)
class Beat:
    """One sign of life of a rank.

    Attributes:
        rank: Who gives it.
        host: Where it runs.
        process: Its process, told apart from all others; see :func:`own_process`.
        count: How many signs it has given before.
        phase: What its training thread is doing.
        progress: How many phases it has entered.
        waits: Whether its training thread is inside ``torch.distributed``: for others, as far as one can see.
        within: Whether its training thread is inside torch, where it may wait for others unseen (replicas do so in
            the backward).
        where: The line of code that the training thread is at.
        idle: Seconds for which its process has computed, read and written nothing.
        done: It has finished, or knows of the failure and is ending.
    """

    rank: int
    host: str
    process: str
    count: int = 0
    phase: str = "setup"
    progress: int = 0
    waits: bool = False
    within: bool = False
    where: str = ""
    idle: float = 0.0
    done: bool = False

    def encode(self) -> str:
        """As it is stored."""
        return json.dumps(vars(self))

    @classmethod
    def decode(cls, stored: bytes) -> "Beat":
        """The inverse of :meth:`encode`."""
        return cls(**json.loads(stored))

    def failure(self, cause: str) -> RankFailure:
        """The error that says that this rank failed."""
        return RankFailure(self.rank, self.host, self.phase, cause)


def find_dead(beats: Mapping[int, Beat]) -> RankFailure | None:
    """The first rank whose process, on this host, has ended without a word."""
    for _, beat in sorted(beats.items()):
        if not beat.done and _has_ended(beat.process):
            return beat.failure(
                "its process ended without a word, as one killed by SIGKILL or for want of memory does"
            )
    return None


def find_silent(beats: Mapping[int, Beat], silence: Mapping[int, float], limit: float) -> RankFailure | None:
    """The rank that has been silent for the longest, if that is longer than ``limit`` seconds."""
    running = [rank for rank, beat in beats.items() if not beat.done]
    if not running:
        return None
    rank = max(running, key=lambda rank: silence[rank])
    if silence[rank] <= limit:
        return None
    return beats[rank].failure(
        f"it has given no sign of life for {silence[rank]:.0f} s; its process was killed or stopped, or its host or "
        "the network to it is gone"
    )


def find_stuck(beats: Mapping[int, Beat], stillness: Mapping[int, float], limit: float) -> RankFailure | None:
    """The rank that all wait for, if no rank has entered a new phase for ``limit`` seconds."""
    waited_for = _waited_for(beats, stillness, limit)
    if waited_for is None:
        return None
    return waited_for.failure(
        f"the others have waited for it for {stillness[waited_for.rank]:.0f} s; it is stuck at {waited_for.where}"
    )


def find_idle(beats: Mapping[int, Beat], stillness: Mapping[int, float], limit: float) -> RankFailure | None:
    """The rank that all have waited for for ``limit`` seconds, if it has done nothing for as long."""
    waited_for = _waited_for(beats, stillness, limit)
    if waited_for is None or waited_for.idle <= limit:
        return None
    return waited_for.failure(
        f"the others have waited for it for {stillness[waited_for.rank]:.0f} s, and it has computed, read and "
        f"written nothing for {waited_for.idle:.0f} s; it hangs at {waited_for.where}"
    )


def _waited_for(beats: Mapping[int, Beat], stillness: Mapping[int, float], limit: float) -> Beat | None:
    """The only rank that waits for nobody; else, where waits are not seen (on GPUs), the one behind the others; else
    the one of these that is not inside torch.

    A later stage of a pipeline is behind an earlier one that hangs. Where neither singles out a rank, which one the
    others wait for cannot be told and nothing is said.
    """
    running = [beat for beat in beats.values() if not beat.done]
    if len(running) < 2 or min(stillness[beat.rank] for beat in running) <= limit:
        return None
    last = min(beat.progress for beat in running)
    behind = [beat for beat in running if beat.progress == last]
    for candidates in ([beat for beat in running if not beat.waits], behind):
        if len(candidates) == 1:
            return candidates[0]
    at_work = [beat for beat in behind if not beat.waits]
    for candidates in (at_work, [beat for beat in at_work if not beat.within]):
        if len(candidates) == 1:
            return candidates[0]
    return None


def is_echo(error: BaseException) -> bool:
    """Whether ``error`` says no more than that communication failed, as it does where another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in ("/gloo/", "[gloo]", "NCCL", "Gloo"))
    )


def own_process() -> str:
    """A name for this process that no other has, or an empty one where the system has no ``/proc``.

    Process numbers mean something in one boot and namespace only, and are used again.
    """
    return f"{_scope()} {os.getpid()} {_start_time(os.getpid())}" if _scope() else ""


def _has_ended(process: str) -> bool:
    if not process or process.rsplit(" ", 2)[0] != _scope():
        return False  # not of this host, so not to be seen from here
    _, number, started = process.rsplit(" ", 2)
    return _start_time(int(number)) != started


def _scope() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(process: int) -> str:
    """Clock ticks from boot to the start of the process; empty for none, and for one that only waits to be reaped."""
    try:
        # The second field is the program's name in parentheses, which may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, started = fields[0], fields[19]
    return "" if state in "ZX" else started


def position_of(stack: Sequence[Line]) -> tuple[bool, bool, str]:
    """Whether a thread is inside ``torch.distributed``, whether inside torch, and its innermost line outside of it.

    Args:
        stack: The lines that it is at, the innermost first.
    """
    if not stack:
        return False, False, "its end"
    distributed_folder = os.path.dirname(dist.__file__) + os.sep
    torch_folder = os.path.dirname(os.path.dirname(dist.__file__)) + os.sep
    waits = False  # in collectives of DTensor's the innermost line is that of an operator
    for line in stack:
        if not line.file.startswith(torch_folder):
            return waits, line is not stack[0], str(line)
        waits |= line.file.startswith(distributed_folder)
    return waits, True, str(stack[-1])
