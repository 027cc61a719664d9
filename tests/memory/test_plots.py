"""The timeline picture."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes

from lightning_memopt.memory.plots import COLORS, PHASE_COLORS, plot_timelines, thin
from lightning_memopt.memory.report import CATEGORIES, MemoryReport, TimelinePoint
from tests.memory.synthetic import MIB, report_of_a_step

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The axes that a call draws on, kept for inspection."""
    axes = []
    original = Axes.stackplot

    def stackplot(self, *args, **options):
        axes.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Axes, "stackplot", stackplot)
    return axes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_png_is_written_into_folders_that_did_not_exist(tmp_path):
    path = plot_timelines({"plain": report_of_a_step()}, tmp_path / "new" / "folder" / "memory.png")
    assert path.read_bytes().startswith(PNG_SIGNATURE)


def test_a_report_draws_itself(tmp_path):
    assert report_of_a_step().plot(str(tmp_path / "memory.png")).read_bytes().startswith(PNG_SIGNATURE)


def test_the_panels_share_one_scale_and_each_names_its_peak(tmp_path, drawn):
    large, small = report_of_a_step(), report_of_a_step(activations_per_layer=8 * MIB)
    plot_timelines({"plain": large, "saved": small}, tmp_path / "memory.png")
    assert [axes.get_title("left") for axes in drawn] == ["plain", "saved"]
    assert drawn[0].get_ylim() == drawn[1].get_ylim()
    assert drawn[0].get_ylim()[1] * MIB >= large.peak_bytes
    assert f"peak {large.peak_bytes / MIB:.1f} MiB" in texts(drawn[0])
    assert f"peak {small.peak_bytes / MIB:.1f} MiB" in texts(drawn[1])


def test_the_phases_are_named_in_their_order(tmp_path, drawn):
    plot_timelines({"plain": report_of_a_step()}, tmp_path / "memory.png")
    assert [text for text in texts(drawn[0]) if not text.startswith("peak")] == ["forward", "backward", "step"]


def test_a_sliver_of_a_phase_does_not_shorten_the_names_of_the_others(tmp_path, drawn):
    report = report_of_a_step()
    first_step = next(i for i, point in enumerate(report.timeline) if point.phase == "step")
    sliver = [replace(report.timeline[first_step], phase=phase) for phase in ("forward", "backward")]
    timeline = (*report.timeline[:first_step], *sliver, *report.timeline[first_step:])
    plot_timelines({"plain": replace(report, timeline=timeline)}, tmp_path / "memory.png")
    assert [text for text in texts(drawn[0]) if not text.startswith("peak")] == ["forward", "backward", "step"]


def test_phases_too_narrow_for_their_names_get_initials_and_never_overlap(tmp_path, drawn):
    plot_timelines({"a": report_of_a_step(micro_batches=8)}, tmp_path / "memory.png")
    assert [text for text in texts(drawn[0]) if not text.startswith("peak")] == [*"fb" * 8, "step"]


def test_the_top_of_the_stack_is_the_sum_of_the_categories(tmp_path, drawn):
    report = report_of_a_step()
    plot_timelines({"plain": report}, tmp_path / "memory.png")
    tops = [collection.get_datalim(drawn[0].transData).y1 for collection in drawn[0].collections]
    assert max(tops) * MIB == pytest.approx(report.peak_bytes)


def test_many_reports_wrap_into_rows(tmp_path, drawn):
    plot_timelines({str(i): report_of_a_step() for i in range(5)}, tmp_path / "memory.png")
    assert len(drawn) == 5


def test_the_global_backend_and_style_of_matplotlib_stay_as_they_were(tmp_path):
    script = (
        "import sys, matplotlib\n"
        "matplotlib.rcParams['font.size'] = 31\n"
        "from tests.memory.synthetic import report_of_a_step\n"
        f"report_of_a_step().plot({str(tmp_path / 'memory.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams['font.size'] == 31\n"
        "assert matplotlib.get_backend(auto_select=False) is None\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_a_style_of_the_user_does_not_change_the_picture(tmp_path):
    first = plot_timelines({"a": report_of_a_step()}, tmp_path / "first.png").read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert plot_timelines({"a": report_of_a_step()}, tmp_path / "second.png").read_bytes() == first


def test_thinning_keeps_the_peak_and_the_order_of_the_phases():
    points = [TimelinePoint("forward", "", {"activations": i % 7}) for i in range(10_000)]
    points[4321] = TimelinePoint("forward", "", {"activations": 1000})
    points += [TimelinePoint("step", "", {"activations": 1})]
    thinned = thin(points, 100)
    assert len(thinned) <= 101
    assert max(p.total_bytes for p in thinned) == 1000
    assert [p.phase for p in thinned[-2:]] == ["forward", "step"]


def test_an_optimizer_of_many_allocations_leaves_most_of_the_picture_to_the_other_phases():
    points = [TimelinePoint("forward", "", {"activations": 5})] * 100
    points += [TimelinePoint("step", "", {"temporaries": i % 11}) for i in range(300)]
    thinned = thin(points, 1000)
    assert sum(p.phase == "forward" for p in thinned) == 100
    assert 20 <= sum(p.phase == "step" for p in thinned) <= 25
    assert max(p.total_bytes for p in thinned) == 10


def test_every_category_and_phase_has_a_color_of_its_own():
    assert set(COLORS) == set(CATEGORIES)
    assert len(set(COLORS.values())) == len(CATEGORIES)
    assert set(PHASE_COLORS) == {"forward", "backward", "step", "other"}


def test_a_missing_matplotlib_names_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-memopt\[plot\]'"):
        plot_timelines({"a": report_of_a_step()}, tmp_path / "memory.png")
    assert not (tmp_path / "memory.png").exists()


def test_impossible_arguments_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="reports is empty"):
        plot_timelines({}, tmp_path / "memory.png")
    with pytest.raises(ValueError, match="'bare' has no timeline"):
        plot_timelines({"bare": MemoryReport(0, {}, {}, ())}, tmp_path / "memory.png")
    with pytest.raises(ValueError, match=r"memory\.pdf.*PNG"):
        plot_timelines({"a": report_of_a_step()}, tmp_path / "memory.pdf")
