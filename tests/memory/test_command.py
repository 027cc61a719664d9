"""``lightning-memopt report`` reads what the monitor of a real run wrote, and compares it."""

import json

import lightning.pytorch as pl
import pytest

from lightning_memopt import MemoryMonitor, predict_memory
from lightning_memopt.cli import main
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder with a run that had a prediction."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    entry = ZOO["mlp"]
    monitor = MemoryMonitor(dirpath=folder, predicted=predict_memory(entry.build(), entry.batch()))
    _train(monitor)
    return folder


def _train(monitor: MemoryMonitor) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=3, callbacks=[monitor], enable_model_summary=False, **quiet)
    trainer.fit(ZOO["mlp"].build(), ZOO["mlp"].loader())


def test_predicted_is_set_against_measured(run_folder, capsys):
    assert main(["report", str(run_folder.parent), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(run_folder)
    assert said["measured"]["peak_bytes"] == sum(said["measured"]["by_category"].values())
    assert said["error"] == said["predicted"]["peak_bytes"] / said["measured"]["peak_bytes"] - 1
    assert abs(said["error"]) < 0.05


def test_people_get_a_table_with_the_error(run_folder, capsys):
    assert main(["report", str(run_folder)]) == 0
    said = capsys.readouterr().out
    assert "optimizer_state" in said and "predicted" in said and "%" in said


def test_a_run_without_a_prediction_says_how_to_keep_one(run_folder, tmp_path, capsys):
    # The folder had another run's prediction before.
    (tmp_path / "memory_predicted.json").write_text((run_folder / "memory_predicted.json").read_text())
    _train(MemoryMonitor(dirpath=tmp_path))
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "MemoryMonitor(predicted=" in said and "error" not in said
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["predicted"] is None


@pytest.mark.parametrize("said", ["{", "[]", '{"plans": [], "chosen": null, "measured_bytes": 3}'])
def test_a_plan_that_cannot_be_read_is_refused_in_one_line(tmp_path, capsys, said):
    (tmp_path / "memory_plan.json").write_text(said)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "memory_plan.json is not what MemoryPlan wrote" in error


@pytest.mark.parametrize("name", ["missing", "empty", "damaged"])
def test_a_folder_that_has_no_run_is_refused_in_one_line(tmp_path, capsys, name):
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    if name == "damaged":
        (folder / "memory_report.json").write_text('{"peak_bytes": 3}')
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said and "MemoryMonitor" in said
