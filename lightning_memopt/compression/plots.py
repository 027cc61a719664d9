"""Draw what compression did: bytes before and after by module, and accuracy against bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_memopt.memory.pictures import drawn_to

if TYPE_CHECKING:
    from lightning_memopt.compression.report import CompressionReport

_BEFORE, _AFTER, _DISK = "#b8bec8", "#3d5a80", "#e9a23b"
_MOST_BARS = 24
_LONGEST_NAME = 56
"""Letters of a name that are drawn: where more are, the end of it, which tells modules apart."""
_MIB = 2**20


def plot_report(report: "CompressionReport", path: str | Path) -> Path:
    """Draw the bytes of the largest modules: before, in memory after, and packed on disk.

    Args:
        report: What to draw.
        path: PNG file to write; missing folders are made.

    Returns:
        Where the picture is.

    Raises:
        ValueError: ``path`` is not a ``.png`` file.
        ModuleNotFoundError: matplotlib is missing; it comes with the extra ``lightning-memopt[plot]``.
    """
    modules = sorted(report.modules, key=lambda module: -module.bytes_before - module.bytes_after)
    largest, rest = modules[:_MOST_BARS], modules[_MOST_BARS:]
    names = [_shortened(module.name or "(root)") for module in largest]
    series = {
        "before, in memory": (_BEFORE, [module.bytes_before for module in largest]),
        "after, in memory": (_AFTER, [module.bytes_after for module in largest]),
        "after, on disk": (_DISK, [module.disk_bytes_after for module in largest]),
    }
    if rest:
        names.append(f"{len(rest)} more")
        for (_, values), field in zip(
            series.values(), ("bytes_before", "bytes_after", "disk_bytes_after"), strict=True
        ):
            values.append(sum(getattr(module, field) for module in rest))
    with drawn_to(path, 9, 1.2 + 0.42 * len(names)) as figure:
        axes = figure.subplots()
        for place, (title, (color, values)) in enumerate(series.items()):
            heights = [row + 0.27 * (place - 1) for row in range(len(names))]
            axes.barh(heights, [value / _MIB for value in values], height=0.25, color=color, label=title)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("MiB")
        axes.set_title(f"{report.ratio:.3f} of the bytes in memory, {report.disk_ratio:.3f} on disk", loc="left")
        axes.legend(frameon=False)
    return Path(path)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"\u2026{name[1 - _LONGEST_NAME :]}"


def plot_tradeoff(points: Mapping[str, tuple[float, float]], path: str | Path, metric: str = "metric") -> Path:
    """Draw a metric against bytes, one point a recipe.

    Args:
        points: ``(bytes, metric)`` by the name of the recipe.
        path: PNG file to write; missing folders are made.
        metric: What the vertical axis shows.

    Returns:
        Where the picture is.

    Raises:
        ValueError: ``path`` is not a ``.png`` file.
        ModuleNotFoundError: matplotlib is missing; it comes with the extra ``lightning-memopt[plot]``.
    """
    with drawn_to(path, 7, 4.2) as figure:
        axes = figure.subplots()
        for name, (size, value) in points.items():
            axes.scatter(size / 1024, value, color=_AFTER, zorder=3)
            axes.annotate(
                name, (size / 1024, value), xytext=(5, 4), textcoords="offset points", fontsize=8, parse_math=False
            )
        axes.set_xscale("log")
        axes.set_xlabel("KiB on disk")
        axes.set_ylabel(metric)
        axes.grid(alpha=0.3)
    return Path(path)
