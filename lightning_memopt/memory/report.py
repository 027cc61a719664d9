"""What a measurement or a prediction says: peak, categories, submodules, timeline."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "temporaries",
    "buffers",
    "other",
)
"""The categories of :attr:`MemoryReport.by_category`, bottom to top as they are drawn.

``activations`` are made in the forward (and by recomputation) and alive for the backward; ``temporaries`` are
gradients of activations and whatever a kernel allocates inside; ``other`` is the batch and what no phase owns.
"""

Phase = Literal["forward", "backward", "step", "other"]


@dataclass(frozen=True)
class TimelinePoint:
    """Memory in use at one moment.

    Attributes:
        phase: What the training loop was doing.
        module: Qualified name of the submodule that was running, ``""`` outside any.
        by_category: Bytes in use by category (:data:`CATEGORIES`).
    """

    phase: Phase
    module: str
    by_category: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes in use, all categories together."""
        return sum(self.by_category.values())


@dataclass(frozen=True)
class JsonReport:
    """A report that JSON can hold.

    Attributes:
        parts: Of what class the items of a field are, where they are reports themselves.
    """

    parts: ClassVar[Mapping[str, type[Any]]] = {}

    def to_json(self) -> str:
        """The whole report as JSON; :meth:`from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is not JSON or lacks a field.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            for name, part in cls.parts.items():
                fields[name] = [part(**item) for item in fields[name]]
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a {cls.__name__}: {error}") from error


@dataclass(frozen=True)
class MemoryReport(JsonReport):
    """Memory of one optimizer step, measured or predicted.

    Attributes:
        peak_bytes: The most bytes that were in use at once.
        by_category: Bytes at the moment of the peak by category; they sum to ``peak_bytes``.
        by_submodule: Bytes at the moment of the peak by the submodule that allocated them (parameters: that owns
            them), by qualified name; ``""`` is what no submodule allocated. They sum to ``peak_bytes``.
        timeline: Memory over the step, in order; its largest point is the peak.
        source: ``"measured"`` or ``"predicted"``.
        device: Device type that the bytes are on (``"cpu"``, ``"cuda"``).
        notes: Sentences on what the figures leave out, if anything.
    """

    peak_bytes: int
    by_category: Mapping[str, int]
    by_submodule: Mapping[str, int]
    timeline: tuple[TimelinePoint, ...]
    source: Literal["measured", "predicted"] = "measured"
    device: str = "cpu"
    notes: tuple[str, ...] = ()

    parts: ClassVar[Mapping[str, type[Any]]] = {"timeline": TimelinePoint}

    def plot(self, path: str | Path) -> Path:
        """Draw the timeline by category as a PNG (needs the ``plot`` extra) and return where it is.

        Args:
            path: File to write; missing folders are made.
        """
        from lightning_memopt.memory.plots import plot_timelines

        return plot_timelines({self.source: self}, path)


def format_bytes(count: int | float) -> str:
    """Bytes for people, in powers of two: ``format_bytes(3 * 2**20) == "3.0 MiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1023.95:  # as it is printed
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
