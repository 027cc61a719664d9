"""Watch over the other ranks: where one fails, end this one too, with an error that names it."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_memopt.parallel.idleness import Idleness, is_debugged
from lightning_memopt.parallel.stack import Line, stack_of
from lightning_memopt.parallel.verdict import (
    Beat,
    RankFailure,
    find_dead,
    find_idle,
    find_silent,
    find_stuck,
    is_echo,
    own_process,
    position_of,
)

_VERDICT = "verdict"
_STORE_ANSWERS_SECONDS = 5
_BETWEEN_SIGNS_SECONDS = 0.05  # at least: a thread that gives signs takes time from the one that trains
_BETWEEN_READINGS_SECONDS = 0.2
_CHECKS_OF_A_CLOSED_STORE = 20
_LONG_SILENCE_SECONDS = 5
_LONG_PHASE_SECONDS = 5


class RankWatch:
    """A thread that gives signs of life of this rank, and ends the rank when another gives none.

    A rank whose peer was killed or hangs waits for it inside a collective, until a time limit that has to allow for
    the slowest validation, or sees only that a connection was closed. The watch talks past the collectives, through
    the process group's store, so every rank learns which failed, in which phase and of what.

    What it does about a failure: it lets the training thread raise if that notices by itself (ask :meth:`explain`
    for what to raise), aborts process groups so that it may (NCCL), and where the thread is still stuck after
    ``grace_seconds`` writes the sentence to stderr and ends the process.

    Args:
        silent_seconds: A rank that gives no sign of life for so long has failed. Signs come from a thread of their
            own, so computing, compiling or validating for long is not silence.
        stuck_seconds: Ranks that all stay in one phase for so long have failed, by the fault of the one that the
            others wait for; ``None``: never, since a long validation on one rank looks the same.
        idle_seconds: Likewise where the one that the others wait for does nothing at all meanwhile (see
            :class:`~lightning_memopt.parallel.idleness.Idleness`), which no validation looks like. Before the first
            phase, where data are prepared, and in a debugger ranks may wait for long.
        grace_seconds: How long the training thread is given to raise by itself.

    Example:
        >>> watch = RankWatch()
        >>> watch.start()  # doctest: +SKIP
        >>> watch.enter("forward of batch 0")
        >>> watch.stop()
    """

    def __init__(
        self,
        silent_seconds: float = 30,
        stuck_seconds: float | None = None,
        idle_seconds: float = 45,
        grace_seconds: float = 10,
    ) -> None:
        self.silent_seconds = silent_seconds
        self.stuck_seconds = stuck_seconds
        self.idle_seconds = idle_seconds
        self.grace_seconds = grace_seconds
        self.interval = min(1.0, silent_seconds / 10)
        self.phase = "setup"
        self.progress = 0
        self.failure: RankFailure | None = None
        self._thread: threading.Thread | None = None
        self._entered = threading.Event()
        self._handled = threading.Event()  # the training thread is about to raise
        self._stopped = threading.Event()
        self._judged = threading.Event()
        self._lock = threading.Lock()

    # What the training thread calls

    def start(self) -> None:
        """Begin; with all ranks of the initialized process group. Does nothing for one rank."""
        if not dist.is_initialized() or dist.get_world_size() == 1 or self._thread is not None:
            return
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.phase, self.progress, self.failure = "setup", 0, None
        for event in (self._handled, self._stopped, self._judged):
            event.clear()
        # A connection of its own: the process group's waits, with its lock held, for peers that may never come.
        store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=_STORE_ANSWERS_SECONDS))
        # Every rank starts its watches in the same order, so this is the same number on each of them.
        number = store.add(f"lightning_memopt/watch/starts/{self.rank}", 1)
        self._store = dist.PrefixStore(f"lightning_memopt/watch/{number}", store)
        self._own = Beat(self.rank, socket.gethostname(), own_process())
        self._watched_thread = threading.get_ident()
        self._beats: dict[int, Beat] = {}
        self._changed = dict.fromkeys(range(self.world_size), time.monotonic())
        self._moved = dict(self._changed)
        self._idleness = Idleness(self.idle_seconds)
        self._beat()
        self._thread = threading.Thread(target=self._run, name="lightning_memopt-watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """Say what this rank does from now on.

        Raises:
            RankFailure: A rank has failed. A collective that NCCL aborted returns as if it were done, and a step
                taken, or a checkpoint saved, with what it left would be wrong.
        """
        if self._thread is not None and self.failure is not None:
            raise self.failure
        self.progress += 1
        if phase != self.phase:
            self.phase = phase
            self._entered.set()

    def explain(self, error: BaseException) -> RankFailure | None:
        """What to raise in place of ``error``, which the training thread has just raised; ``None``: ``error`` itself.

        Tells the other ranks of an error of this rank's own. An error that only echoes a failure elsewhere is held
        back until it is known whose that is, for ``silent_seconds`` at most.
        """
        if self._thread is None:
            return None
        self._handled.set()
        if not is_echo(error):
            self._judge(self._current().failure(f"it raised {type(error).__name__}: {error}"))
        elif not self._judged.wait(self.silent_seconds + 2 * self.interval):
            stuck = find_stuck(dict(self._beats), self._since(self._moved), self.interval)
            self._judge(stuck or self._current().failure(f"communication failed, and every rank is alive: {error}"))
        self._wait_for_others(self.grace_seconds)
        return self.failure if is_echo(error) and error is not self.failure else None

    def stop(self) -> None:
        """End the watch: this rank needs the others no more. Rank 0, which may hold the store, waits for theirs."""
        if self._thread is None:
            return
        self._stopped.set()
        self._entered.set()
        self._thread.join(2 * _STORE_ANSWERS_SECONDS)
        self._wait_for_others(self.silent_seconds)
        self._thread = None

    # What the watching thread does

    def _run(self) -> None:
        looked = -self.interval
        while not self._stopped.wait(_BETWEEN_SIGNS_SECONDS):
            # A sign at once of a phase entered, so that a rank that is killed in it is known to have been in it.
            if self._entered.wait(min(self.interval, _BETWEEN_READINGS_SECONDS)) and not self._stopped.is_set():
                self._entered.clear()
            complete = len(self._beats) == self.world_size
            if complete and time.monotonic() < looked + self.interval and not self._judged.is_set():
                with suppress(RuntimeError):
                    self._beat()
                    if self.rank != 0:
                        self._read([0])  # with which the store goes, and all that could be asked then
                continue
            looked = time.monotonic()
            failure = self._look()
            if failure is not None:
                self._judge(failure)
            if self._judged.is_set():
                self._end()
                return
        with suppress(RuntimeError):
            self._beat()

    def _look(self) -> RankFailure | None:
        """Give a sign of life, read the others', and judge them."""
        still = self._since(self._moved)[self.rank]
        # It matters where nothing moves, and only there looking does not keep alive what would be freed.
        stack = stack_of(self._watched_thread) if still > self.interval / 2 else None
        waits, within, where = (False, False, "") if stack is None else position_of(stack)
        self._own = replace(self._own, waits=waits, within=within, where=where, idle=self._idle_for(still, stack))
        try:
            self._beat()
            self._read(range(self.world_size))
            told = self._store.multi_get([_VERDICT])[0] if self._store.check([_VERDICT]) else b""
        except RuntimeError as error:  # torch raises several kinds, all of them derived from it
            return self._store_is_gone(error)
        if told:
            return RankFailure(*json.loads(told))
        others = {rank: beat for rank, beat in self._beats.items() if rank != self.rank}
        failure = find_dead(others) or find_silent(others, self._since(self._changed), self.silent_seconds)
        if failure is None and len(self._beats) == self.world_size:
            failure = find_idle(self._beats, self._since(self._moved), self.idle_seconds)
            if failure is None and self.stuck_seconds is not None:
                failure = find_stuck(self._beats, self._since(self._moved), self.stuck_seconds)
        return failure

    def _idle_for(self, still: float, stack: list[Line] | None) -> float:
        """Seconds for which this rank has done nothing in the phase that it is in; asked only where that is long."""
        if self.progress == 0 or still <= _LONG_PHASE_SECONDS or stack is None or is_debugged(stack):
            self._idleness.begin()
        return self._idleness.seconds()

    def _store_is_gone(self, error: RuntimeError) -> RankFailure | None:
        host = self._beats.get(0)
        if host is not None and host.done:
            return None
        first = host or Beat(0, host="unknown", process="")
        for _ in range(_CHECKS_OF_A_CLOSED_STORE):  # a process that is killed closes its sockets before it is gone
            if dead := find_dead({0: first}):
                return dead
            time.sleep(_BETWEEN_SIGNS_SECONDS)
        return first.failure(
            f"the store that the ranks meet at, on rank 0 or in its launcher, does not answer ({error})"
        )

    def _end(self) -> None:
        """Get this rank to raise, or end its process."""
        assert self.failure is not None
        sentence = f"[rank {self.rank}] {type(self.failure).__name__}: {self.failure}"
        is_own = self.failure.rank == self.rank
        if not is_own:
            # Before the rank that raised hears that this one knows, and ends: launchers end all with the first.
            print(sentence, file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            self._beat()  # so that rank 0 knows that this one knows
        if not self._handled.is_set():
            # In a thread of its own: an abort waits for kernels, which may wait for the rank that failed.
            threading.Thread(target=_abort_process_groups, daemon=True).start()
            self._handled.wait(self.grace_seconds)
        if self._handled.is_set() and self._stopped.wait(self.silent_seconds):
            return
        if is_own:
            print(sentence, file=sys.stderr, flush=True)
        self._wait_for_others(self.grace_seconds)
        os._exit(1)

    # What both do

    def _judge(self, failure: RankFailure) -> None:
        """Let all ranks name the same failure: the first that was told of."""
        with self._lock:
            if self._judged.is_set():
                return
            with suppress(RuntimeError):
                told = self._store.compare_set(_VERDICT, "", json.dumps(failure.args))
                failure = RankFailure(*json.loads(told))
            self.failure = failure
            self._judged.set()

    def _current(self) -> Beat:
        done = any(event.is_set() for event in (self._stopped, self._handled, self._judged))
        return replace(self._own, phase=self.phase, progress=self.progress, done=done)

    def _beat(self) -> None:
        self._own = replace(self._current(), count=self._own.count + 1)
        self._store.set(str(self.rank), self._own.encode())

    def _read(self, ranks: Iterable[int]) -> None:
        known = [rank for rank in ranks if rank in self._beats or self._store.check([str(rank)])]
        now = time.monotonic()
        for rank, stored in zip(known, self._store.multi_get([str(rank) for rank in known]), strict=True):
            beat, before = Beat.decode(stored), self._beats.get(rank)
            if before is None or before.count != beat.count:
                self._changed[rank] = now
            if before is None or before.progress != beat.progress:
                self._moved[rank] = now
            self._beats[rank] = beat

    def _since(self, times: dict[int, float]) -> dict[int, float]:
        now = time.monotonic()
        return {rank: now - then for rank, then in times.items()}

    def _wait_for_others(self, seconds: float) -> None:
        """On rank 0: keep the store, which this process may hold, until the others have read how it ended."""
        end = time.monotonic() + seconds
        while self.rank == 0 and time.monotonic() < end:
            with suppress(RuntimeError):
                self._beat()
                self._read(range(self.world_size))
            others = {rank: beat for rank, beat in self._beats.items() if rank != 0}
            silence = self._since(self._changed)
            if all(
                beat.done or find_dead({rank: beat}) or silence[rank] > _LONG_SILENCE_SECONDS
                for rank, beat in others.items()
            ):
                return
            time.sleep(self.interval / 4)


def _abort_process_groups() -> None:
    for group in list(distributed_c10d._world.pg_map):
        with suppress(Exception):  # not every backend can, and none may keep the others from it
            group.abort()
