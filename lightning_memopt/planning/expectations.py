"""How long a choice will take, from the evaluations of others: the order in which choices are looked at."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from lightning_memopt.planning.space import Choice, Techniques

Part = tuple[str, Any]


class Expectations:
    """Seconds of choices without evaluations of their own.

    Each layout and each technique multiplies the time by a factor of its own: the usual one, until evaluations tell
    which it is here.

    Args:
        base: What the others are compared with.
        seconds: Its time.
        samples: In a batch of one device.
    """

    def __init__(self, base: Choice, seconds: float, samples: int) -> None:
        self._base = base
        self._seconds = seconds
        self._samples = samples
        self._factors: dict[Part, float] = {}

    def __call__(self, choice: Choice) -> float:
        """Seconds that are expected of ``choice``."""
        seconds = self._seconds
        for part in self._parts(choice):
            seconds *= self._factors.get(part) or self._usual(part)
        return seconds

    def learn(self, choice: Choice, seconds: float) -> None:
        """Take down what ``choice`` took: what was expected wrongly is laid to those parts of it that are new."""
        new = [part for part in self._parts(choice) if part not in self._factors]
        off = seconds / self(choice)
        for part in new:
            self._factors[part] = self._usual(part) * off ** (1 / len(new))

    def _parts(self, choice: Choice) -> Iterator[Part]:
        """The layout, and each technique that is not as in the base."""
        if choice.layout != self._base.layout:
            yield "layout", choice.layout
        base = self._base.techniques
        for name in (field.name for field in fields(Techniques)):
            value = getattr(choice.techniques, name)
            if value != getattr(base, name):
                yield name, value

    def _usual(self, part: Part) -> float:
        name, value = part
        if name == "layout":
            factor: float = value.usual_slowdown / self._base.layout.usual_slowdown
            return factor
        base = self._base.techniques
        return replace(base, **{name: value}).usual_slowdown(self._samples) / base.usual_slowdown(self._samples)
