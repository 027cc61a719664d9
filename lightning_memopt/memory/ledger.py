"""The books of a measurement: who held which bytes from when to when, and the report drawn from them."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal, NamedTuple

from lightning_memopt.memory.report import CATEGORIES, MemoryReport, Phase, TimelinePoint


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
        node: Number of the autograd node that made it; None outside the backward.
    """

    states: list[State]
    address: int | None = None
    node: int | None = None

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

    def take_over_from(self, source: "Holding") -> None:
        """Hold the memory of ``source``, and so none of its own before that is released."""
        end = source.states[-1].since if source.is_released else None
        if end is None or (self.is_released and self.states[-1].since.time <= end.time):
            self.states = [self.states[-1]._replace(size_bytes=0)]
            return
        earlier = [state for state in self.states if state.since.time <= end.time]
        later = [state for state in self.states if state.since.time > end.time]
        self.states = [*(state._replace(since=end) for state in earlier[-1:]), *later]

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
    """

    begin: Moment
    end: int


@dataclass(frozen=True, slots=True)
class Accumulation:
    """Autograd's sum of two gradients of one tensor.

    Without a dispatch mode (such as the tracker) it adds in place where nobody else holds ``into``; with one it makes
    a new tensor.
    """

    into: Holding
    result: Holding
    time: int


@dataclass(frozen=True, slots=True)
class SparseCopy:
    """Autograd's copy of (the indices or the values of) a sparse gradient, for a parameter that has none.

    Without a dispatch mode (such as the tracker) the parameter's gradient shares ``source``. So does a sparse tensor
    its indices where these have values, of which a fake one makes fake indices.
    """

    source: Holding
    result: Holding


@dataclass
class Ledger:
    """Everything that one measurement saw.

    Attributes:
        holdings: All memory that was ever held.
        operations: All operators, in order.
        accumulations: The operators among them that sum gradients.
        sparse_copies: And those that copy them.
        opened_at: Time at which the report begins; what is held then is where it starts from.
        closed_at: Time at which the report ends; None for the end of the run.
    """

    holdings: list[Holding] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    accumulations: list[Accumulation] = field(default_factory=list)
    sparse_copies: list[SparseCopy] = field(default_factory=list)
    opened_at: int = 0
    closed_at: int | None = None

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

    def undo_observer_effect(self) -> None:
        """Count sums and copies of gradients as autograd makes them when no tracker watches: in place."""
        sources: dict[Holding, Holding] = {}
        for copy in self.sparse_copies:
            sources[copy.result] = sources.get(copy.source, copy.source)  # of a copy's copy
        for result, source in sources.items():
            result.take_over_from(source)
        for accumulation in self.accumulations:
            released, first = accumulation.into.states[-1], accumulation.result.states[0]
            later = bisect_right(self.operations, accumulation.time, key=lambda operation: operation.begin.time)
            deadline = self.operations[later].begin.time if later < len(self.operations) else released.since.time
            nobody_else_held_it = released.size_bytes == 0 and released.since.time <= deadline
            if nobody_else_held_it and first.since.time <= released.since.time:
                since = first.since._replace(time=released.since.time)
                accumulation.result.states[0] = first._replace(since=since)

    def report(
        self, *, source: Literal["measured", "predicted"], device: str, notes: Sequence[str], points: int = 1000
    ) -> MemoryReport:
        """Replay the books and say where the peak is and what was held then, in at most ``points`` of a timeline."""
        for holding in self.holdings:
            _settle_category(holding)
        steps = sorted(_steps(self.holdings), key=lambda step: step[1].since.time)
        if self.closed_at is not None:
            steps = steps[: bisect_right(steps, self.closed_at, key=lambda step: step[1].since.time)]
        opening = sum(1 for _, state in steps if state.since.time <= self.opened_at)
        held: Counter[tuple[str, str]] = Counter()
        by_category: Counter[str] = Counter()
        total = peak_bytes = 0
        at_peak = held.copy()
        timeline: list[TimelinePoint] = []
        for count, (before, now) in enumerate(steps, start=1):
            for state, sign in ((before, -1), (now, 1)):
                if state is not None:
                    held[state.category, state.owner] += sign * state.size_bytes
                    by_category[state.category] += sign * state.size_bytes
                    total += sign * state.size_bytes
            if count < opening:
                continue
            snapshot = {category: by_category[category] for category in CATEGORIES}
            timeline.append(TimelinePoint(now.since.phase, now.since.module, snapshot))
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
            timeline=tuple(_thin(timeline, points)),
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


def _thin(timeline: Sequence[TimelinePoint], most: int) -> Iterable[TimelinePoint]:
    """At most so many runs of neighbours, of each run the largest point, so that peaks stay."""
    run_length = max(1, ceil(len(timeline) / most))
    for start in range(0, len(timeline), run_length):
        yield max(timeline[start : start + run_length], key=lambda point: point.total_bytes)
