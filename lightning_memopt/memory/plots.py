"""Draw memory over a training step as a picture."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

from lightning_memopt.memory.pictures import drawn_to
from lightning_memopt.memory.report import CATEGORIES, MemoryReport, TimelinePoint, format_bytes

COLORS: Mapping[str, str] = {
    "parameters": "#3d5a80",
    "gradients": "#e9a23b",
    "optimizer_state": "#6a994e",
    "activations": "#c8553d",
    "temporaries": "#f2b5a0",
    "buffers": "#8d7ab8",
    "other": "#b8bec8",
}
"""One color for each of :data:`~lightning_memopt.memory.report.CATEGORIES`, told apart also without red and green."""

PHASE_COLORS: Mapping[str, str] = {"forward": "#eef3f9", "backward": "#fdf3e7", "step": "#eaf4ec", "other": "#ffffff"}
"""Background of each phase of the timeline."""

_POINTS_PER_PANEL = 1500
_STEP_SHARE = 0.25
_NARROWEST_LABEL = 0.12  # inches
_PANELS_PER_ROW = 3
_INK, _FAINT_INK = "#222831", "#6b7280"


def plot_timelines(reports: Mapping[str, MemoryReport], path: str | Path) -> Path:
    """Draw timelines side by side on one scale: bytes by category, phases shaded, the peak marked.

    The horizontal axis counts allocations, not seconds. Long timelines and the many small allocations of an optimizer
    are thinned (:func:`thin`); the highest point of each group is kept, so that no peak is lost.

    Args:
        reports: What to draw, by the title of its panel, from left to right.
        path: PNG file to write; missing folders are made.

    Returns:
        Where the picture is.

    Raises:
        ValueError: ``reports`` is empty or has a report without a timeline, or ``path`` is not a ``.png`` file.
        ModuleNotFoundError: matplotlib is missing; it comes with the extra ``lightning-memopt[plot]``.

    Example:
        >>> point = TimelinePoint("forward", "", {"parameters": 2**20})
        >>> report = MemoryReport(2**20, point.by_category, {"": 2**20}, (point,))
        >>> plot_timelines({"plain": report}, "timeline.png").name
        'timeline.png'
    """
    _refuse_empty(reports)
    rows, columns = ceil(len(reports) / _PANELS_PER_ROW), min(len(reports), _PANELS_PER_ROW)
    width, height = max(9.0, 5.2 * columns), 3.9 * rows + 0.7
    with drawn_to(path, width, height) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        unit_bytes, unit = _unit(max(report.peak_bytes for report in reports.values()))
        panels = list(grid.flat)
        for axes, (title, report) in zip(panels, reports.items(), strict=False):
            _draw_panel(axes, title, report, unit_bytes, panel_inches=width / columns)
        for axes in panels[len(reports) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"memory in use ({unit})", color=_FAINT_INK)
        highest = max(report.peak_bytes for report in reports.values())
        panels[0].set_ylim(0, max(highest, 1) * 1.14 / unit_bytes)
        _draw_legend(figure, reports)
    return Path(path)


def thin(timeline: Sequence[TimelinePoint], count: int) -> list[TimelinePoint]:
    """About ``count`` points of ``timeline`` to draw: the highest of each group of neighbours, phases kept apart.

    An optimizer makes many small allocations, parameter by parameter. Its groups are made larger where that is needed
    to leave most of the picture to the forward and the backward.
    """
    steps = sum(point.phase == "step" for point in timeline)
    group = max(1, ceil(len(timeline) / count))
    room_for_steps = _STEP_SHARE * (len(timeline) - steps)
    step_group = group * max(1, ceil(steps / room_for_steps)) if room_for_steps else group
    kept: list[TimelinePoint] = []
    for phase, run in groupby(timeline, key=lambda point: point.phase):
        points, size = list(run), step_group if phase == "step" else group
        kept += [max(points[i : i + size], key=lambda p: p.total_bytes) for i in range(0, len(points), size)]
    return kept


def _refuse_empty(reports: Mapping[str, MemoryReport]) -> None:
    if not reports:
        raise ValueError("reports is empty: a picture needs at least one memory report")
    for title, report in reports.items():
        if not report.timeline:
            raise ValueError(f"report {title!r} has no timeline: there is nothing to draw")


def _unit(highest_bytes: int) -> tuple[int, str]:
    """The unit of the vertical axis: the one in which the highest figure is at least 2."""
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if highest_bytes >= 2 * size:
            return size, name
    return 1, "B"


def _draw_panel(axes: Any, title: str, report: MemoryReport, unit_bytes: int, panel_inches: float) -> None:
    points = thin(report.timeline, _POINTS_PER_PANEL)
    # Each point lasts until the next one, the last as long as the others.
    edges = range(len(points) + 1)
    layers = [[p.by_category.get(name, 0) / unit_bytes for p in points] for name in CATEGORIES]
    axes.stackplot(
        edges,
        [[*layer, layer[-1]] for layer in layers],
        colors=[COLORS[name] for name in CATEGORIES],
        step="post",
        linewidth=0,
    )
    _draw_phases(axes, points, panel_inches)
    _draw_peak(axes, points, report.peak_bytes, unit_bytes)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_xlim(0, len(points))
    axes.tick_params(axis="both", length=0, labelsize=9, colors=_FAINT_INK, labelleft=True)
    axes.grid(axis="y", color="#9aa3af", alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9aa3af")


def _draw_phases(axes: Any, points: Sequence[TimelinePoint], panel_inches: float) -> None:
    spans, start = [], 0
    for phase, run in groupby(points, key=lambda point: point.phase):
        stop = start + len(list(run))
        spans.append((phase, start, stop))
        axes.axvspan(start, stop, color=PHASE_COLORS[phase], linewidth=0, zorder=-2)
        if start:
            axes.axvline(start, color="#9aa3af", linewidth=0.6, alpha=0.7)
        start = stop

    inches = panel_inches / len(points)
    # A sliver (a parameter's hook between backward and step) gets no label, and so does not make the others short.
    labelled = [
        (phase, (stop - start) * inches)
        for phase, start, stop in spans
        if phase in ("forward", "backward") and (stop - start) * inches >= _NARROWEST_LABEL
    ]
    names_fit = all(width >= 0.085 * len(phase) for phase, width in labelled)
    for phase, start, stop in spans:
        width, is_last = (stop - start) * inches, stop == len(points)
        if phase == "other" or (width < _NARROWEST_LABEL and not is_last):
            continue
        # A narrow last phase (the optimizer's step) has the margin to spill into.
        spills = is_last and width < 0.09 * len(phase)
        axes.text(
            start if spills else (start + stop) / 2,
            -0.02,
            phase if names_fit or is_last else phase[0],
            transform=axes.get_xaxis_transform(),
            ha="left" if spills else "center",
            va="top",
            fontsize=9,
            color=_FAINT_INK,
        )
    axes.set_xticks([])
    axes.set_xlabel(
        "one optimizer step, in the order of its allocations", fontsize=8.5, color=_FAINT_INK, labelpad=17
    )


def _draw_peak(axes: Any, points: Sequence[TimelinePoint], peak_bytes: int, unit_bytes: int) -> None:
    from matplotlib import patheffects

    position = max(range(len(points)), key=lambda i: points[i].total_bytes) + 0.5
    height = peak_bytes / unit_bytes
    share = position / len(points)
    axes.axhline(height, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.55)
    axes.plot([position], [height], marker="o", markersize=5.5, color=_INK, markeredgecolor="white", clip_on=False)
    text = axes.annotate(
        f"peak {format_bytes(peak_bytes)}",
        (position, height),
        xytext=(0, 8),
        textcoords="offset points",
        ha="left" if share < 0.25 else "right" if share > 0.75 else "center",
        fontsize=10.5,
        fontweight="bold",
        color=_INK,
    )
    text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white", alpha=0.9)])


def _draw_legend(figure: Any, reports: Mapping[str, MemoryReport]) -> None:
    from matplotlib.patches import Patch

    highest = max(report.peak_bytes for report in reports.values())
    # A category too thin to see would be a color of the legend that the reader looks for in vain.
    visible = [
        name
        for name in CATEGORIES
        if any(p.by_category.get(name, 0) > highest / 500 for report in reports.values() for p in report.timeline)
    ]
    figure.legend(
        handles=[Patch(color=COLORS[name], label=name.replace("_", " ")) for name in visible],
        loc="outside upper center",
        ncols=max(1, min(len(visible), int(figure.get_figwidth() / 1.28))),
        frameon=False,
        fontsize=10,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=1.6,
    )
