"""The books of a measurement: who held which bytes from when to when, and the report drawn from them."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lightning_memopt.memory.report import CATEGORIES, MemoryReport, Phase, TimelinePoint

_TIMELINE_POINTS = 1000


class Moment(NamedTuple):
    """When something happened.

    Attributes:
        time: Nanoseconds, or any number that grows from one event to the next.
        phase: What the training loop was doing.
        module: Qualified name of the submodule that was running, ``""`` outside any.
    """

    time: int
    phase: Phase
    module: str


class State(NamedTuple):
    """What a holding is from one moment on; no bytes once it is released."""

    since: Moment
    size_bytes: int
    category: str
    owner: str


@dataclass(slots=True, eq=False)
class Holding:
    """One piece of memory from allocation to release.

    Attributes:
        states: What it was over time, oldest first. A gradient is a temporary until its parameter accumulates it.
        address: Where it starts; None on fake tensors, which are nowhere.
    """

    states: list[State]
    address: int | None = None

    def change(
        self, moment: Moment, *, size_bytes: int | None = None, category: str | None = None, owner: str | None = None
    ) -> None:
        """Begin a new state that differs from the last in what is given."""
        last = self.states[-1]
        self.states.append(
            State(
                moment,
                last.size_bytes if size_bytes is None else size_bytes,
                last.category if category is None else category,
                last.owner if owner is None else owner,
            )
        )

    @property
    def is_released(self) -> bool:
        """Whether it holds nothing any more."""
        return self.states[-1].size_bytes == 0

    @property
    def is_opening(self) -> bool:
        """Whether it was there before the measurement began."""
        return self.states[0].since.time == 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One dispatched operator.

    Attributes:
        begin: When it was called.
        end: The time at which its results were on the books.
        new_bytes: Bytes of its results that were not there before.
        call: What was called, for whoever models its scratch; None where the allocator itself tells.
        scratch_bytes: The most that it held beside its results, where that is known.
    """

    begin: Moment
    end: int
    new_bytes: int
    call: Any = None
    scratch_bytes: int = 0


@dataclass
class Ledger:
    """Everything that one measurement saw."""

    holdings: list[Holding] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def moment_at(self, time: int) -> Moment:
        """The phase and the submodule of the operator that was running at ``time`` (or the last before)."""
        index = bisect_right(self.operations, time, key=lambda operation: operation.begin.time) - 1
        if index < 0:
            return Moment(time, "other", "")
        return self.operations[index].begin._replace(time=time)

    def add_scratch(self, operation: Operation, size_bytes: int) -> None:
        """Book memory that ``operation`` held while it ran and gave back before it returned."""
        if size_bytes > 0:
            begin = operation.begin
            at = begin._replace(time=operation.end)
            state = State(at, size_bytes, "temporaries", begin.module)
            self.holdings.append(Holding([state, state._replace(size_bytes=0)]))

    def report(self, *, source: Literal["measured", "predicted"], device: str, notes: Sequence[str]) -> MemoryReport:
        """Replay the books and say where the peak is and what was held then."""
        for holding in self.holdings:
            _settle_category(holding)
        steps = sorted(_steps(self.holdings), key=lambda step: step[1].since.time)
        held: Counter[tuple[str, str]] = Counter()
        at_peak, peak_bytes, total = held.copy(), 0, 0
        points: list[TimelinePoint] = []
        by_category: Counter[str] = Counter()
        for index, (before, now) in enumerate(steps):
            if before is not None:
                held[before.category, before.owner] -= before.size_bytes
                by_category[before.category] -= before.size_bytes
                total -= before.size_bytes
            held[now.category, now.owner] += now.size_bytes
            by_category[now.category] += now.size_bytes
            total += now.size_bytes
            still_opening = index + 1 < len(steps) and steps[index + 1][1].since.time == 0
            if still_opening:
                continue
            snapshot = {category: by_category[category] for category in CATEGORIES}
            points.append(TimelinePoint(now.since.phase, now.since.module, snapshot))
            if total > peak_bytes:
                peak_bytes, at_peak = total, held.copy()
        owners: Counter[str] = Counter()
        categories = dict.fromkeys(CATEGORIES, 0)
        for (category, owner), size_bytes in at_peak.items():
            categories[category] += size_bytes
            owners[owner] += size_bytes
        return MemoryReport(
            peak_bytes=peak_bytes,
            by_category=categories,
            by_submodule={owner: size for owner, size in sorted(owners.items()) if size},
            timeline=tuple(_thin(points)),
            source=source,
            device=device,
            notes=tuple(notes),
        )


def _settle_category(holding: Holding) -> None:
    """What the forward made and dropped again was a temporary: no backward needed it."""
    states = holding.states
    released_in_forward = holding.is_released and states[-1].since.phase == "forward"
    if released_in_forward and all(state.category == "activations" for state in states):
        holding.states = [state._replace(category="temporaries") for state in states]


def _steps(holdings: Iterable[Holding]) -> Iterable[tuple[State | None, State]]:
    for holding in holdings:
        before: State | None = None
        for state in holding.states:
            yield before, state
            before = state


def _thin(points: Sequence[TimelinePoint]) -> Iterable[TimelinePoint]:
    """At most ``_TIMELINE_POINTS`` runs of neighbours, of each run the largest point, so that peaks stay."""
    run_length = max(1, len(points) // _TIMELINE_POINTS)
    for start in range(0, len(points), run_length):
        yield max(points[start : start + run_length], key=lambda point: point.total_bytes)
