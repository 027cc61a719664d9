"""What a report says about itself."""

import json
from dataclasses import replace

import pytest

from lightning_memopt.memory.report import CATEGORIES, MemoryReport, TimelinePoint, format_bytes
from tests.memory.synthetic import MIB, report_of_a_step


def test_a_report_survives_json_whole():
    report = replace(report_of_a_step(), notes=("Scratch memory is left out.",), device="cuda", source="predicted")
    assert MemoryReport.from_json(report.to_json()) == report


def test_json_has_the_fields_by_their_names():
    fields = json.loads(report_of_a_step().to_json())
    assert set(fields) == {"peak_bytes", "by_category", "by_submodule", "timeline", "source", "device", "notes"}
    assert set(fields["timeline"][0]) == {"phase", "module", "by_category"}


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"peak_bytes": 1}', '{"timeline": [], "notes": [], "color": 1}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError):
        MemoryReport.from_json(text)


def test_a_point_sums_its_categories():
    assert TimelinePoint("forward", "net", {"parameters": 3, "activations": 4}).total_bytes == 7
    assert TimelinePoint("other", "", {}).total_bytes == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB - 8, "1.0 MiB"),
        (3 * MIB, "3.0 MiB"),
        (1023.9 * MIB, "1023.9 MiB"),
        (1024 * MIB, "1.00 GiB"),
        (139 * 1024 * MIB, "139.00 GiB"),
        (-2 * MIB, "-2.0 MiB"),
    ],
)
def test_bytes_are_printed_in_powers_of_two(count, text):
    assert format_bytes(count) == text


def test_the_synthetic_step_keeps_what_every_report_must():
    report = report_of_a_step()
    assert sum(report.by_category.values()) == sum(report.by_submodule.values()) == report.peak_bytes
    assert max(point.total_bytes for point in report.timeline) == report.peak_bytes
    assert set(report.by_category) == set(CATEGORIES)
