"""Find the fastest choices that fit, tracing as few of them as can be."""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lightning_memopt.planning.space import Choice, Layout


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


class Refused(ValueError):
    """A choice cannot be; raised by what evaluates it."""


def search(
    choices: Iterable[Choice],
    expected: Callable[[Choice], float],
    evaluate: Callable[[Choice], Evaluation],
    budget_bytes: int,
    *,
    wanted: int,
) -> Found:
    """Evaluate the choices that are expected to be fast first, until enough of them fit.

    Savings cost time. So of two choices of which one has all savings of the other, the larger is worth nothing where
    the smaller fits; and where the larger does not fit, the smaller does not. Neither is evaluated then. Of each
    layout the most frugal choice is looked at first: where that does not fit, nothing there does.

    Args:
        choices: All there are.
        expected: Time as it is expected before evaluation, in the unit of ``evaluate``.
        evaluate: The truth; raises :class:`Refused`.
        budget_bytes: What fits.
        wanted: Stop when so many fit and what is left is expected to be slower than each of them.
    """
    found = Found({}, {}, {})
    remaining = list(choices)
    waiting = [(expected(choice), index) for index, choice in enumerate(remaining)]
    heapq.heapify(waiting)
    kept: dict[Choice, Evaluation] = {}
    layouts: dict[Layout, bool] = {}
    while waiting:
        seconds, index = heapq.heappop(waiting)
        fastest = sorted(evaluation.total_seconds for evaluation in kept.values())[:wanted]
        if len(fastest) == wanted and seconds > fastest[-1]:
            break
        choice = remaining[index]
        if choice.layout not in layouts:
            possible = [other for other in remaining if other.layout == choice.layout]
            layouts[choice.layout] = _may_fit(possible, evaluate, budget_bytes, found)
        if not layouts[choice.layout] or choice in found.refused or _is_dominated(choice, found, kept):
            continue
        if choice not in found.fitting:
            _evaluate(choice, evaluate, budget_bytes, found)
        if choice in found.fitting:
            kept[choice] = found.fitting[choice]
    found.fitting = dict(sorted(kept.items(), key=lambda item: item[1].total_seconds))
    return found


def _may_fit(
    possible: list[Choice], evaluate: Callable[[Choice], Evaluation], budget_bytes: int, found: Found
) -> bool:
    """Whether the most frugal of some choices of one layout fits; what that layout refuses is noted on the way."""
    while possible:
        frugal = _most_frugal(possible)
        for choice in frugal:
            if choice not in found.refused:
                _evaluate(choice, evaluate, budget_bytes, found)
        reasons = {choice: found.refused[choice] for choice in frugal if choice in found.refused}
        if not reasons:
            return any(choice in found.fitting for choice in frugal)
        for choice in possible:
            for reason in reasons.values():
                if choice.has_refused(reason):
                    found.refused[choice] = reason
        possible = [choice for choice in possible if choice not in found.refused]
    return False


def _evaluate(choice: Choice, evaluate: Callable[[Choice], Evaluation], budget_bytes: int, found: Found) -> None:
    try:
        evaluation = evaluate(choice)
    except Refused as refusal:
        found.refused[choice] = str(refusal)
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
