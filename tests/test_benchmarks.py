"""The benchmarks: tables are what the results say, results grow row by row, and the scripts run at toy size."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.results_file import OtherEnvironmentError, ResultsFile

ROOT = Path(__file__).parent.parent
RESULTS = {
    "environment": {"cpu": "A CPU", "threads": 2, "packages": {"torch": "2.13.0", "lightning": "2.6.6"}},
    "time_method": "Time is the median ratio of 8 pairs of neighbouring steps.",
    "rows": {
        "plain": {
            "title": "plain Lightning", "limit": "", "measured_at": "2026-01-01 10:00 UTC",
            "memory": {"peak_bytes": 900 * 2**20, "predicted_peak_bytes": 900 * 2**20},
            "time": {"ratio": 1.002},
        },
        "full": {
            "title": "checkpointing, full", "limit": "the block that is being recomputed",
            "measured_at": "2026-01-01 11:00 UTC",
            "memory": {"peak_bytes": 240 * 2**20, "predicted_peak_bytes": 252 * 2**20},
            "quantity": "activations", "memory_ratio": 0.1204, "memory_target": 0.13,
            "time": {"ratio": 1.41}, "time_target": 1.35, "met": False,
        },
        "broken": {"title": "broken", "limit": "", "measured_at": "2026-01-01 11:00 UTC", "error": "ValueError: no"},
    },
}  # fmt: skip


@pytest.fixture
def results_folder(tmp_path):
    (tmp_path / "single_device.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_a_table_between_markers_says_what_was_measured_and_keeps_the_text_around_it(results_folder):
    text = "before\n<!-- table:single_device -->\nold\n<!-- /table -->\nafter\n"
    new = tables.rewrite(text, results_folder)
    assert new.startswith("before\n<!-- table:single_device -->\n| technique |")
    assert new.endswith("<!-- /table -->\nafter\n") and "old" not in new
    full = next(line for line in new.splitlines() if line.startswith("| checkpointing, full"))
    for figure in ("240 MiB", "activations 0.120 (≤ 0.13)", "1.41 (≤ 1.35)", "**no**", "1.050", "being recomputed"):
        assert figure in full
    assert "ValueError: no" in new
    assert "A CPU, 2 threads, torch 2.13.0, lightning 2.6.6, 2026-01-01 10:00 UTC to 2026-01-01 11:00 UTC" in new
    assert tables.rewrite(new, results_folder) == new


def test_a_marker_without_results_is_refused_by_name(results_folder):
    with pytest.raises(ValueError, match=r"gpu\.json, which was never measured"):
        tables.rewrite("<!-- table:gpu -->\n<!-- /table -->", results_folder)
    with pytest.raises(ValueError, match="table:bananas is no table"):
        tables.rewrite("<!-- table:bananas -->\n<!-- /table -->", results_folder)


def test_the_tables_of_the_readme_and_the_docs_are_what_the_results_say():
    check = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert check.returncode == 0, check.stderr


def test_results_are_merged_row_by_row_in_the_order_of_the_table(tmp_path):
    path = tmp_path / "results.json"
    header = {"environment": {"cpu": "one"}}
    ResultsFile(path, header).add("second", {"ratio": 1}, ["first", "second"])
    ResultsFile(path, header).add("first", {"ratio": 2}, ["first", "second"])
    ResultsFile(path, header).add("second", {"ratio": 3}, ["first", "second"])
    assert json.loads(path.read_text()) == header | {"rows": {"first": {"ratio": 2}, "second": {"ratio": 3}}}
    assert list(ResultsFile(path, header).rows) == ["first", "second"]


def test_figures_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "results.json"
    ResultsFile(path, {"environment": {"cpu": "one"}}).add("row", {}, ["row"])
    with pytest.raises(OtherEnvironmentError, match="another environment"):
        ResultsFile(path, {"environment": {"cpu": "two"}})


@pytest.mark.slow
def test_a_row_of_the_single_device_benchmark_runs_at_toy_size(tmp_path):
    path = tmp_path / "results.json"
    _script("single_device.py", "--quick", "--pairs", "2", "--only", "checkpointing_full", "--out", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["plain", "checkpointing_full"]
    full = rows["checkpointing_full"]
    assert full["memory"]["peak_bytes"] < rows["plain"]["memory"]["peak_bytes"]
    assert full["memory_ratio"] < 0.8 and full["quantity"] == "activations+temporaries"
    assert full["time"]["pairs"] == 2 and full["time"]["ratio"] > 0
    assert full["memory"]["predicted_peak_bytes"] == pytest.approx(full["memory"]["peak_bytes"], rel=0.02)


@pytest.mark.slow
def test_a_row_of_the_compression_benchmark_runs_at_toy_size_and_is_drawn(tmp_path):
    path = tmp_path / "compression.json"
    arguments = ("--quick", "--runs", "2", "--only", "digits_cnn.structured", "--only", "digits_cnn.torch_prune")
    _script("compression.py", *arguments, "--out", str(path))
    rows = json.loads(path.read_text())["rows"]
    ours, peer = rows["digits_cnn.structured"], rows["digits_cnn.torch_prune"]
    assert ours["memory_ratio"] < 0.3 and ours["targets"]["disk_ratio"] == 0.35 and ours["met"] in (True, False)
    assert peer["memory_ratio"] == 1 and peer["notes"]["training_memory_ratio"] > 1.9 and peer["met"] is None
    drawn = tables.rewrite("<!-- table:compression -->\n<!-- /table -->\n", tmp_path)
    assert "| 50% of the structure, fine-tuned |" in drawn and "| *torch.nn.utils.prune, 80% global* |" in drawn


@pytest.mark.slow
def test_the_speed_of_a_scheme_is_measured_at_toy_size_and_drawn(tmp_path):
    path = tmp_path / "scheme_speed.json"
    _script("scheme_speed.py", "--quick", "--runs", "2", "--only", "fp16", "--out", str(path))
    row = json.loads(path.read_text())["rows"]["fp16"]
    assert row["ratio"] < 0.6 and all(
        speed > 0 for speeds in row.values() if isinstance(speeds, list) for speed in speeds
    )
    assert "| `fp16` | 0.5" in tables.rewrite("<!-- table:scheme_speed -->\n<!-- /table -->\n", tmp_path)


@pytest.mark.slow
def test_toy_figures_may_not_replace_the_real_ones():
    ran = _script("single_device.py", "--quick", check=False)
    assert ran.returncode == 2 and "--quick needs --out" in ran.stderr


@pytest.mark.slow
def test_without_a_gpu_its_benchmark_says_so_and_runs_at_toy_size(tmp_path):
    path = tmp_path / "gpu.json"
    ran = _script("gpu.py", "--only", "checkpointing_full", "--out", str(path), hide_gpu=True)
    assert "No CUDA GPU here" in ran.stdout
    rows = json.loads(path.read_text())["rows"]
    assert rows["checkpointing_full"]["loss_difference"] == 0


def test_on_a_gpu_activations_are_offloaded_to_pinned_memory_and_predicted_without_one(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    (offload,) = gpu._trainer_options("offload", on_gpu=True)["callbacks"]
    assert offload._arguments[0] == "cpu"
    on_cpu, on_gpu = (gpu._predicted_peak("offload", gpu.TOY, on_gpu=on_gpu) for on_gpu in (False, True))
    assert on_cpu < on_gpu < 1.02 * on_cpu  # blocks of 512 bytes, and AdamW steps all tensors at once


@pytest.mark.slow
def test_the_time_that_the_import_takes_is_taken_apart_from_lightnings(tmp_path):
    path = tmp_path / "import_time.json"
    _script("import_time.py", "--runs", "2", "--out", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert 0 < rows["lightning_memopt"]["seconds"] < rows["lightning.pytorch"]["seconds"]


def _script(name: str, *arguments: str, check: bool = True, hide_gpu: bool = False) -> subprocess.CompletedProcess:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *arguments],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert not check or ran.returncode == 0, ran.stdout + ran.stderr
    return ran
