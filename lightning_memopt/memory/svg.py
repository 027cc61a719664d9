"""Draw timelines and histories as SVG text for an HTML page; no library needed."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from math import ceil, log2

from lightning_memopt.memory.plots import COLORS, PHASE_COLORS, thin
from lightning_memopt.memory.report import CATEGORIES, MemoryReport, TimelinePoint, format_bytes

_WIDTH, _HEIGHT = 900, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 16, 26, 26
_POINTS = 450


def timeline_svg(report: MemoryReport, scale_bytes: int) -> str:
    """The timeline of ``report`` as stacked areas by category.

    Args:
        report: What to draw; one without a timeline gives an empty string.
        scale_bytes: Bytes at the top of the picture: the same for pictures that are to be compared.
    """
    points = thin(report.timeline, _POINTS)
    if not points:
        return ""
    frame = _Frame(len(points), scale_bytes)
    start, bands = 0, []
    for phase, run in groupby(points, key=lambda point: point.phase):
        stop = start + len(list(run))
        bands.append(frame.band(start, stop, PHASE_COLORS[phase], phase if phase != "other" else ""))
        start = stop
    highest = max(range(len(points)), key=lambda i: points[i].total_bytes)
    peak = frame.mark(highest + 0.5, report.peak_bytes, f"peak {format_bytes(report.peak_bytes)}")
    return frame.wrap([*bands, *frame.grid(), *_areas(points, frame), peak], "memory over one optimizer step")


def history_svg(steps: Sequence[int], peaks: Sequence[int]) -> str:
    """Peaks in bytes over optimizer steps as a line with a dot for each; one step alone gives an empty string."""
    if len(steps) < 2 or steps[-1] == steps[0]:
        return ""
    frame = _Frame(steps[-1] - steps[0], max(peaks))
    corners = [(frame.x(step - steps[0]), frame.y(peak)) for step, peak in zip(steps, peaks, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLORS["parameters"]}">'
        f"<title>step {step}: {format_bytes(peak)}</title></circle>"
        for (x, y), step, peak in zip(corners, steps, peaks, strict=True)
    ]
    labels = [
        f'<text x="{frame.x(step - steps[0]):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">step {step}</text>'
        for step, anchor in ((steps[0], "start"), (steps[-1], "end"))
    ]
    stroke = f'<polyline points="{line}" fill="none" stroke="{COLORS["parameters"]}" stroke-width="2"/>'
    return frame.wrap([*frame.grid(), stroke, *dots, *labels], "peak by optimizer step")


class _Frame:
    """Maps positions and bytes to the picture, with room for the axes."""

    def __init__(self, length: float, scale_bytes: int) -> None:
        self.length = length
        self.top_bytes = max(scale_bytes, 1) * 1.06

    def x(self, position: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * position / self.length

    def y(self, count: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * count / self.top_bytes

    def grid(self) -> list[str]:
        """Horizontal lines at round figures of bytes."""
        step = _round_step(self.top_bytes / 5)
        lines = []
        for i in range(int(self.top_bytes / step) + 1):
            y = self.y(i * step)
            lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_bytes(i * step)}</text>')
        return lines

    def band(self, start: int, stop: int, color: str, label: str) -> str:
        left, right = self.x(start), self.x(stop)
        rectangle = (
            f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}" '
            f'fill="{color}"><title>{label}</title></rect>'
        )
        if right - left < 9 * len(label):
            return rectangle
        return f'{rectangle}<text x="{(left + right) / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{label}</text>'

    def mark(self, position: float, count: int, label: str) -> str:
        x, y = self.x(position), self.y(count)
        anchor = "start" if position < self.length / 5 else "end" if position > self.length * 0.8 else "middle"
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="peak"/>'
            f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="{anchor}" class="peak">{escape(label)}</text>'
        )

    @staticmethod
    def wrap(parts: Sequence[str], label: str) -> str:
        inner = "\n".join(parts)
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">\n{inner}\n</svg>'


def _areas(points: Sequence[TimelinePoint], frame: _Frame) -> list[str]:
    areas = []
    floor_bytes = [0] * len(points)
    for name in CATEGORIES:
        ceiling = [below + p.by_category.get(name, 0) for below, p in zip(floor_bytes, points, strict=True)]
        if ceiling != floor_bytes:
            outline = _steps(ceiling, frame) + _steps(floor_bytes, frame)[::-1]
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
            title = name.replace("_", " ")
            areas.append(f'<polygon points="{corners}" fill="{COLORS[name]}"><title>{title}</title></polygon>')
        floor_bytes = ceiling
    return areas


def _steps(heights: Sequence[int], frame: _Frame) -> list[tuple[float, float]]:
    return [(frame.x(i + side), frame.y(height)) for i, height in enumerate(heights) for side in (0, 1)]


def _round_step(at_least: float) -> float:
    """The smallest power of two that is no less than ``at_least``: round in B, KiB, MiB and GiB alike."""
    return 2.0 ** ceil(log2(max(at_least, 1)))
