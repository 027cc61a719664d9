"""The HTML page."""

from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lightning_memopt.memory.html import SampledStep, render_html
from lightning_memopt.memory.report import MemoryReport
from lightning_memopt.memory.svg import history_svg, timeline_svg
from tests.memory.synthetic import MIB, report_of_a_step


class Reader(HTMLParser):
    """Collects tables as rows of texts, and every attribute that could cause a request."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.requests, self.tags, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.requests += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_the_page_needs_nothing_from_outside():
    page = Reader(render_html({"measured": report_of_a_step()}))
    assert page.requests == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in render_html({"measured": report_of_a_step()})


def test_the_categories_and_their_total_stand_in_a_table_by_report():
    plain, saved = report_of_a_step(), report_of_a_step(activations_per_layer=8 * MIB)
    rows = Reader(render_html({"plain": plain, "saved": saved})).tables[0]
    assert rows[0] == ["category", "plain", "saved"]
    assert ["parameters", "36.0 MiB", "36.0 MiB"] in rows
    assert rows[-1] == ["total", f"{plain.peak_bytes / MIB:.1f} MiB", f"{saved.peak_bytes / MIB:.1f} MiB"]


def test_submodules_are_sorted_and_those_left_out_are_summed():
    by_submodule = {f"layer.{i}": (i + 1) * MIB for i in range(30)}
    report = MemoryReport(sum(by_submodule.values()), {"activations": sum(by_submodule.values())}, by_submodule, ())
    rows = Reader(render_html({"measured": report}, submodules=3)).tables[1]
    assert rows[1:] == [
        ["layer.29", "30.0 MiB"],
        ["layer.28", "29.0 MiB"],
        ["layer.27", "28.0 MiB"],
        ["27 others", "378.0 MiB"],
    ]


def test_names_titles_and_notes_cannot_break_out_of_the_text():
    evil = "<script>alert(1)</script>"
    report = replace(report_of_a_step(), notes=(evil,), device=evil, by_submodule={evil: 1})
    text = render_html({evil: report}, title=evil, remarks=[evil])
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6


def test_a_prediction_is_held_against_the_measurement():
    measured = replace(report_of_a_step(), peak_bytes=100 * MIB)
    predicted = replace(measured, peak_bytes=102 * MIB, source="predicted")
    text = render_html({"this run": measured, "forecast": predicted})
    assert "Predicted peak (forecast) against measured (this run): 102.0 MiB to 100.0 MiB, +2.0%." in text
    assert "Predicted peak" not in render_html({"this run": measured})


def test_the_history_lists_each_sampled_step_with_its_categories():
    history = [SampledStep(step, (10 + step) * MIB, {"activations": (10 + step) * MIB}) for step in (0, 1, 50)]
    rows = Reader(render_html({"measured": report_of_a_step()}, history=history)).tables[2]
    assert rows == [
        ["step", "peak", "activations"],
        ["0", "10.0 MiB", "10.0 MiB"],
        ["1", "11.0 MiB", "11.0 MiB"],
        ["50", "60.0 MiB", "60.0 MiB"],
    ]


def test_notes_and_remarks_are_shown():
    report = replace(report_of_a_step(), notes=("Scratch memory is left out.",))
    text = render_html({"measured": report}, remarks=["Peak of rank 1: 3.0 MiB."])
    assert "Scratch memory is left out." in text and "Peak of rank 1: 3.0 MiB." in text


def test_no_report_is_refused():
    with pytest.raises(ValueError, match="reports is empty"):
        render_html({})


def test_the_timeline_is_well_formed_and_its_stack_reaches_the_peak():
    report = report_of_a_step()
    picture = ElementTree.fromstring(timeline_svg(report, report.peak_bytes))
    tops = [float(pair.split(",")[1]) for area in picture.iter("polygon") for pair in area.get("points").split()]
    peak = next(circle for circle in picture.iter("circle") if circle.get("class") == "peak")
    assert min(tops) == float(peak.get("cy"))
    assert {"forward", "backward", "step"} <= {title.text for title in picture.iter("title")}


def test_pictures_on_one_scale_draw_half_the_bytes_at_half_the_height():
    report = MemoryReport(MIB, {}, {}, report_of_a_step().timeline[:3])
    heights = []
    for peak in (MIB, 2 * MIB):
        picture = ElementTree.fromstring(timeline_svg(replace(report, peak_bytes=peak), 2 * MIB))
        heights.append(float(next(c for c in picture.iter("circle")).get("cy")))
    base = 250 - 26
    assert base - heights[1] == pytest.approx(2 * (base - heights[0]), abs=0.2)


def test_a_report_without_timeline_and_a_history_of_one_step_have_no_picture():
    assert timeline_svg(MemoryReport(0, {}, {}, ()), 1) == ""
    assert history_svg([3], [MIB]) == ""
    assert history_svg([], []) == ""


def test_the_history_has_a_dot_for_each_step():
    picture = ElementTree.fromstring(history_svg([0, 1, 50], [MIB, 3 * MIB, 2 * MIB]))
    dots = list(picture.iter("circle"))
    assert [dot.find("title").text for dot in dots] == ["step 0: 1.0 MiB", "step 1: 3.0 MiB", "step 50: 2.0 MiB"]
    assert float(dots[1].get("cy")) < float(dots[2].get("cy")) < float(dots[0].get("cy"))
