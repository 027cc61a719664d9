"""Turn the figures of a run and of its plain run into ratios, and hold them against the row's targets."""

from collections.abc import Mapping
from typing import Any

from rows import Row

from lightning_memopt.memory.report import CATEGORIES, MemoryReport


def summarize(report: MemoryReport) -> dict[str, Any]:
    """What the table needs of a report: the peak, the bytes at the peak, and each category's highest."""
    return {
        "peak_bytes": report.peak_bytes,
        "at_peak_bytes": dict(report.by_category),
        "highest_bytes": {
            category: max(point.by_category.get(category, 0) for point in report.timeline) for category in CATEGORIES
        },
        "notes": list(report.notes),
    }


def memory_ratio(row: Row, own: Mapping[str, Any], plain: Mapping[str, Any]) -> float:
    """The ratio that the row's memory target is about, out of two summaries."""
    return _quantity(row, own) / _quantity(row, plain)


def _quantity(row: Row, summary: Mapping[str, Any]) -> int:
    if row.quantity == "peak":
        return summary["peak_bytes"]
    if row.quantity == "activations+temporaries":
        return sum(summary["at_peak_bytes"].get(category, 0) for category in ("activations", "temporaries"))
    return summary["highest_bytes"][row.quantity]


def time_bound(row: Row, known: Mapping[str, Any]) -> float | None:
    """The highest time ratio allowed; a bound that is another row's time is known once that row was measured."""
    if isinstance(row.time_target, str):
        return known.get(row.time_target, {}).get("time", {}).get("ratio")
    return row.time_target
