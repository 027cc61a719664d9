"""Find the fastest choices that fit, tracing as few of them as can be."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from lightning_memopt.planning.space import Choice, Layout

_FAILURES = 4
"""So many choices of a layout that did not fit raise the question whether any does."""


@dataclass(frozen=True)
class Evaluation:
    """What one choice takes.

    Attributes:
        peak_bytes: Its peak.
        by_category: The peak by category.
        seconds: Time of a step by part, in seconds for one batch of the user's.
    """

    peak_bytes: int
    by_category: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def total_seconds(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())


@dataclass
class Found:
    """What a search evaluated.

    Attributes:
        fitting: Choices that fit, the fastest first; none of them only adds savings to another.
        too_large: Choices that do not fit.
        refused: Why some cannot be, by choice.
    """

    fitting: dict[Choice, Evaluation]
    too_large: dict[Choice, Evaluation]
    refused: dict[Choice, str]

    def __or__(self, later: "Found") -> "Found":
        """Both together."""
        return Found(self.fitting | later.fitting, self.too_large | later.too_large, self.refused | later.refused)


class Refused(ValueError):
    """A choice cannot be; raised by what evaluates it."""


class Estimator(Protocol):
    """Knows about choices what others' traces tell."""

    def least(self, choice: Choice) -> int:
        """Bytes that it holds for certain."""

    def exceeds(self, choice: Choice, budget_bytes: int) -> bool | None:
        """Whether it will clearly hold more; ``None`` where that is unknown."""

    def fits(self, choice: Choice, budget_bytes: int) -> bool:
        """Whether it is known to hold less, as far as an estimate can tell."""


def search(
    choices: Iterable[Choice],
    expected: Callable[[Choice], float],
    estimates: Estimator,
    evaluate: Callable[[Choice], Evaluation],
    budget_bytes: int,
    *,
    wanted: int,
) -> Found:
    """Evaluate the choices that are expected to be fast first, until enough of them fit.

    Savings cost time. So of two choices of which one has all savings of the other, the larger is worth nothing where
    the smaller fits; and where the larger does not fit, the smaller does not. Neither is evaluated then. Once a few
    choices of a layout did not fit, the most frugal one is looked at: where that does not fit, nothing there does.
    What is clearly too large by an estimate is left for when nothing else fits. Once what is left is expected to be
    slower than the fastest that fits, that is the one to take: the others to choose from are looked for where an
    estimate says that they fit, and not for long.

    Args:
        choices: All there are.
        expected: Time as it is expected before evaluation, in the unit of ``evaluate``; an evaluation may change what
            is expected of others.
        estimates: What choices hold, before evaluation.
        evaluate: The truth; raises :class:`Refused`.
        budget_bytes: What fits.
        wanted: Stop when so many fit and what is left is expected to be slower than the fastest of them.
    """
    found = Found({}, {}, {})
    remaining = [choice for choice in choices if estimates.least(choice) <= budget_bytes]
    waiting = _queue(remaining, range(len(remaining)), expected)
    kept: dict[Choice, Evaluation] = {}
    layouts: dict[Layout, bool] = {}
    failures: Counter[Layout] = Counter()
    deferred: list[Choice] = []
    others = 0
    while waiting:
        seconds, index = heapq.heappop(waiting)
        fastest = sorted(evaluation.total_seconds for evaluation in kept.values())[:wanted]
        if len(fastest) == wanted and seconds > fastest[0]:
            break
        choice = remaining[index]
        if not layouts.get(choice.layout, True) or choice in found.refused or _is_dominated(choice, found, kept):
            continue
        if estimates.exceeds(choice, budget_bytes):
            deferred.append(choice)
            continue
        if fastest and seconds > fastest[0]:
            if others == wanted or not estimates.fits(choice, budget_bytes):
                continue
            others += 1
        if choice not in found.fitting:
            _evaluate(choice, remaining, evaluate, budget_bytes, found)
            waiting = _queue(remaining, (index for _, index in waiting), expected)
        if choice in found.fitting:
            kept[choice] = found.fitting[choice]
            continue
        failures[choice.layout] += choice in found.too_large
        if failures[choice.layout] >= _FAILURES and choice.layout not in layouts:
            layouts[choice.layout] = may_fit(
                _on(choice.layout, remaining), evaluate, budget_bytes, found, estimates=estimates
            )
    found.fitting = dict(sorted(kept.items(), key=lambda item: item[1].total_seconds))
    for layout in dict.fromkeys(choice.layout for choice in deferred if not kept):
        if may_fit(_on(layout, remaining), evaluate, budget_bytes, found):
            again = search(_on(layout, remaining), expected, _Unknown(), evaluate, budget_bytes, wanted=wanted)
            found = Found(found.fitting | again.fitting, found.too_large | again.too_large, found.refused)
            break
    return found


def _queue(
    choices: list[Choice], indices: Iterable[int], expected: Callable[[Choice], float]
) -> list[tuple[float, int]]:
    queue = [(expected(choices[index]), index) for index in indices]
    heapq.heapify(queue)
    return queue


class _Unknown:
    """No estimates."""

    def least(self, choice: Choice) -> int:
        return 0

    def exceeds(self, choice: Choice, budget_bytes: int) -> bool | None:
        return None

    def fits(self, choice: Choice, budget_bytes: int) -> bool:
        return True


def find_smallest(
    tiers: Iterable[Iterable[Choice]], least: Callable[[Choice], int], evaluate: Callable[[Choice], Evaluation]
) -> Found:
    """Evaluate most frugal choices until what is left holds at least more than the smallest that was found."""
    found = Found({}, {}, {})
    groups = [
        _on(layout, tier) for tier in map(list, tiers) for layout in dict.fromkeys(choice.layout for choice in tier)
    ]
    for group in sorted(groups, key=lambda group: min(map(least, group))):
        smallest = min((evaluation.peak_bytes for evaluation in found.too_large.values()), default=None)
        if smallest is not None and min(map(least, group)) >= smallest:
            break
        may_fit(group, evaluate, 0, found)
    return found


def may_fit(
    possible: list[Choice],
    evaluate: Callable[[Choice], Evaluation],
    budget_bytes: int,
    found: Found,
    *,
    estimates: Estimator | None = None,
) -> bool:
    """Whether the most frugal of some choices of one layout fits, or is estimated to."""
    while remaining := [choice for choice in possible if choice not in found.refused]:
        frugal = _most_frugal(remaining)
        known = [None if estimates is None else estimates.exceeds(choice, budget_bytes) for choice in frugal]
        if None not in known:
            return not all(known)
        for choice in frugal:
            if choice not in found.refused:
                _evaluate(choice, remaining, evaluate, budget_bytes, found)
        if not any(choice in found.refused for choice in frugal):
            return any(choice in found.fitting for choice in frugal)
    return False


def _on(layout: Layout, choices: Iterable[Choice]) -> list[Choice]:
    return [choice for choice in choices if choice.layout == layout]


def _evaluate(
    choice: Choice,
    choices: Iterable[Choice],
    evaluate: Callable[[Choice], Evaluation],
    budget_bytes: int,
    found: Found,
) -> None:
    """Evaluate one of ``choices``; where it is refused, so are those of its layout that have what was refused."""
    if choice in found.fitting or choice in found.too_large:
        return
    try:
        evaluation = evaluate(choice)
    except Refused as refusal:
        reason = str(refusal)
        is_layouts = not choice.has_refused(reason)
        refused = [each for each in _on(choice.layout, choices) if is_layouts or each.has_refused(reason)]
        found.refused.update(dict.fromkeys((choice, *refused), reason))
        return
    (found.fitting if evaluation.peak_bytes <= budget_bytes else found.too_large)[choice] = evaluation


def _is_dominated(choice: Choice, found: Found, kept: Mapping[Choice, Evaluation]) -> bool:
    return any(choice.needs_no_more_than(other) for other in kept) or any(
        other.needs_no_more_than(choice) for other in found.too_large
    )


def _most_frugal(choices: list[Choice]) -> list[Choice]:
    return [
        choice
        for choice in choices
        if not any(other is not choice and other.needs_no_more_than(choice) for other in choices)
    ]
