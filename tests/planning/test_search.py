"""A search looks at few choices and finds the fastest that fits."""

from collections.abc import Callable

import pytest

from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.planning.expectations import Expectations
from lightning_memopt.planning.search import Evaluation, search
from lightning_memopt.planning.space import Choice, Layout, Techniques

_LAYOUTS = [Layout("memopt_ddp", MeshSizes(data=8)), Layout("memopt_zero2", MeshSizes(shard=8))]
_TECHNIQUES = [
    Techniques(level, micro_batch=size) for level in ("none", "selective", "full") for size in (None, 8, 4, 2, 1)
]
_CHOICES = [Choice(layout, techniques) for layout in _LAYOUTS for techniques in _TECHNIQUES]
_BASE = _CHOICES[0]


class _Known:
    """Estimates that are right."""

    def __init__(self, peak: Callable[[Choice], int]) -> None:
        self._peak = peak

    def least(self, choice: Choice) -> int:
        return 0

    def exceeds(self, choice: Choice, budget_bytes: int) -> bool | None:
        return self._peak(choice) > budget_bytes

    def fits(self, choice: Choice, budget_bytes: int) -> bool:
        return self._peak(choice) <= budget_bytes


def _peak(choice: Choice) -> int:
    made = 1600 // {"none": 1, "selective": 2, "full": 8}[choice.techniques.checkpointing]
    return made * (choice.techniques.micro_batch or 16) // 16 + (800 if choice.layout is _LAYOUTS[0] else 100)


def _seconds(choice: Choice) -> float:
    slower = {"none": 1.0, "selective": 1.04, "full": 1.3}[choice.techniques.checkpointing]
    return (
        slower * (1.15 if choice.layout is _LAYOUTS[1] else 1.0) * (1 + 0.1 / (choice.techniques.micro_batch or 100))
    )


def _search(budget_bytes: int) -> tuple[list[Choice], list[Choice]]:
    looked_at: list[Choice] = []
    expectations = Expectations(_BASE, _seconds(_BASE), samples=16)

    def evaluate(choice: Choice) -> Evaluation:
        looked_at.append(choice)
        expectations.learn(choice, _seconds(choice))
        return Evaluation(_peak(choice), {"activations": _peak(choice)}, {"compute": _seconds(choice)})

    found = search(_CHOICES, expectations, _Known(_peak), evaluate, budget_bytes, wanted=3)
    return list(found.fitting), looked_at


@pytest.mark.parametrize("budget_bytes", [300, 700, 1000, 1300, 2400])
def test_the_fastest_choice_that_fits_is_found_among_few(budget_bytes):
    fitting, looked_at = _search(budget_bytes)
    assert fitting[0] == min((c for c in _CHOICES if _peak(c) <= budget_bytes), key=_seconds)
    assert len(looked_at) <= 8


def test_what_an_evaluation_tells_of_a_technique_is_expected_of_it_on_other_layouts():
    expectations = Expectations(_BASE, 2.0, samples=16)
    assert expectations(_BASE) == 2.0
    on = [Choice(layout, Techniques("full")) for layout in _LAYOUTS]
    before = expectations(on[1])
    expectations.learn(on[0], 3.0)
    assert expectations(on[0]) == pytest.approx(3.0)
    assert expectations(on[1]) == pytest.approx(before * 3.0 / (2.0 * 1.33))
