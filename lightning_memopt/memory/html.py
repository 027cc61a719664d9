"""Memory reports as one HTML page that needs nothing else: no script, no font, no request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lightning_memopt.memory.plots import COLORS
from lightning_memopt.memory.report import CATEGORIES, MemoryReport, format_bytes
from lightning_memopt.memory.svg import history_svg, timeline_svg

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222831; max-width: 960px; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem } p { margin: .4rem 0 } pre { white-space: pre-wrap }
table { border-collapse: collapse; width: 100%; font-size: .93rem }
th { text-align: left; color: #6b7280; font-weight: 600; border-bottom: 1px solid #9aa3af }
th, td { padding: .3rem .6rem } tr:nth-child(even) td { background: #f6f7f9 }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums }
td.text, th.text { text-align: left } code { font-size: .92em } .faint { color: #6b7280 }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #6b7280 }
svg text.peak { font-weight: 700; fill: #222831; paint-order: stroke; stroke: white; stroke-width: 3px }
svg circle.peak { fill: #222831; stroke: white } svg .grid { stroke: #9aa3af; stroke-opacity: .3 }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em }
"""


@dataclass(frozen=True)
class SampledStep:
    """The peak of one optimizer step.

    Attributes:
        step: Number of optimizer steps taken before it.
        peak_bytes: The most bytes that were in use at once.
        by_category: Bytes at that moment by category.
    """

    step: int
    peak_bytes: int
    by_category: Mapping[str, int]


def render_html(
    reports: Mapping[str, MemoryReport],
    *,
    title: str = "Memory report",
    history: Sequence[SampledStep] = (),
    remarks: Sequence[str] = (),
    submodules: int = 20,
) -> str:
    """A page with the timelines, tables by category and by submodule, the history and all notes.

    Args:
        reports: What to show, by name. Several stand side by side: runs to compare, or a prediction next to the
            measurement, whose difference is then stated.
        title: Heading of the page.
        history: Peaks of several steps of one run, in order.
        remarks: Sentences to show below the heading.
        submodules: How many submodules the table lists, the largest first; the others are summed in its last row.

    Returns:
        The text of a complete page; every name in it is escaped.

    Raises:
        ValueError: ``reports`` is empty.

    Example:
        >>> report = MemoryReport(2**20, {"activations": 2**20}, {"net.0": 2**20}, ())
        >>> "1.0 MiB" in render_html({"measured": report})
        True
    """
    if not reports:
        raise ValueError("reports is empty: a page needs at least one memory report")
    scale = max(report.peak_bytes for report in reports.values())
    parts = [f"<p>{escape(remark)}</p>" for remark in (*_comparisons(reports), *remarks)]
    for name, report in reports.items():
        parts.append(f"<h2>{escape(name)}: peak {format_bytes(report.peak_bytes)}</h2>")
        parts.append(f'<p class="faint">{escape(report.source)} on {escape(report.device)}</p>')
        parts.append(timeline_svg(report, scale))
        parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    parts += ["<h2>By category, at the peak</h2>", _category_table(reports)]
    parts += ["<h2>By submodule, at the peak</h2>", _submodule_table(reports, submodules)]
    if history:
        parts += ["<h2>Sampled steps</h2>", history_svg([s.step for s in history], [s.peak_bytes for s in history])]
        parts.append(_history_table(history))
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page around ``parts``, which are HTML; ``title`` is plain text."""
    # The policy makes the browser itself refuse any request that a mistake here could cause.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    """An HTML table of plain texts, which are escaped; ``text_columns`` are aligned left, the others right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="text"' if i in text_columns else "" for i in range(len(cells))]
        texts = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(texts)}</tr>"

    return "\n".join(("<table>", line("th", header), *(line("td", row) for row in rows), "</table>"))


def _comparisons(reports: Mapping[str, MemoryReport]) -> list[str]:
    """What each prediction said against each measurement."""
    measured = {name: r for name, r in reports.items() if r.source == "measured" and r.peak_bytes}
    return [
        f"Predicted peak ({name}) against measured ({other}): {format_bytes(prediction.peak_bytes)} to "
        f"{format_bytes(report.peak_bytes)}, {prediction.peak_bytes / report.peak_bytes - 1:+.1%}."
        for name, prediction in reports.items()
        if prediction.source == "predicted"
        for other, report in measured.items()
    ]


def _category_table(reports: Mapping[str, MemoryReport]) -> str:
    present = [name for name in CATEGORIES if any(r.by_category.get(name, 0) for r in reports.values())]
    rows = [
        [name.replace("_", " "), *(format_bytes(r.by_category.get(name, 0)) for r in reports.values())]
        for name in present
    ]
    rows.append(["total", *(format_bytes(report.peak_bytes) for report in reports.values())])
    text = table(["category", *reports], rows)
    for name in present:
        label = name.replace("_", " ")
        swatch = f'<span class="swatch" style="background:{COLORS[name]}"></span>'
        text = text.replace(f'<td class="text">{label}<', f'<td class="text">{swatch}{label}<')
    return text


def _submodule_table(reports: Mapping[str, MemoryReport], count: int) -> str:
    largest = {
        name: max(report.by_submodule.get(name, 0) for report in reports.values())
        for name in dict.fromkeys(name for report in reports.values() for name in report.by_submodule)
    }
    names = sorted(largest, key=lambda name: -largest[name])
    rows = [
        [name or "(no submodule)", *(format_bytes(r.by_submodule.get(name, 0)) for r in reports.values())]
        for name in names[:count]
    ]
    if rest := names[count:]:
        sums = (sum(report.by_submodule.get(name, 0) for name in rest) for report in reports.values())
        rows.append([f"{len(rest)} others", *map(format_bytes, sums)])
    return table(["submodule", *reports], rows)


def _history_table(history: Sequence[SampledStep]) -> str:
    present = [name for name in CATEGORIES if any(sample.by_category.get(name, 0) for sample in history)]
    rows = [
        [str(s.step), format_bytes(s.peak_bytes), *(format_bytes(s.by_category.get(name, 0)) for name in present)]
        for s in history
    ]
    return table(["step", "peak", *(name.replace("_", " ") for name in present)], rows)
