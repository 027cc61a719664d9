"""The demo: its text, its model, and a whole small run from the command line."""

import contextlib
import io
import json

import pytest
import torch

import lightning_memopt as memopt
from lightning_memopt.cli import main
from lightning_memopt.demo.data import Windows, standard_library
from lightning_memopt.demo.model import GPT
from lightning_memopt.demo.presets import PRESETS, TECHNIQUES
from lightning_memopt.demo.run import _build
from lightning_memopt.demo.techniques import callbacks


def test_the_text_is_python_source_split_by_file_and_the_same_each_time():
    first, second = standard_library(), standard_library()
    assert torch.equal(first.training, second.training) and torch.equal(first.held_out, second.held_out)
    assert b"def " in bytes(first.training.numpy()) and b"def " in bytes(first.held_out.numpy())
    assert first.files[0] > 8 * first.files[1] > 0


def test_no_held_out_file_is_trained_on(tmp_path):
    for number in range(25):
        (tmp_path / f"m{number:02}.py").write_text(f"<{number:02}>")
    corpus = standard_library(tmp_path)
    assert bytes(corpus.held_out.numpy()) == b"<09>\n<19>"
    assert corpus.files == (23, 2)
    assert b"<09>" not in bytes(corpus.training.numpy())


def test_a_library_without_sources_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds 0 Python source files"):
        standard_library(tmp_path)


def test_windows_are_slices_of_the_text_at_places_set_by_the_seed():
    text = torch.arange(100, dtype=torch.uint8)
    same, again, other = (Windows(text, 10, 50, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same.starts, other.starts)
    for index in range(50):
        window = same[index]
        assert window.dtype == torch.int64 and torch.equal(window.diff(), torch.ones(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="5 bytes, and one window needs 10"):
        Windows(text[:5], 10, 1, 0)


def test_the_command_line_and_the_demo_know_the_same_techniques():
    for preset in PRESETS.values():
        made = {type(callbacks([name], preset)[0]) for name in TECHNIQUES}
        assert len(made) == len(TECHNIQUES)


def test_the_default_model_has_about_ten_million_parameters_and_a_tied_head():
    model = _build(PRESETS["small"], seed=0)
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 12e6
    assert model.head.weight is model.embedding.weight


def test_the_model_does_not_look_ahead():
    torch.manual_seed(0)
    model = GPT(layers=2, width=32, heads=2, context=16).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 7
    assert torch.allclose(model(tokens)[:, :10], model(changed)[:, :10], atol=1e-6)
    assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:], atol=1e-3)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One whole demo at the tiny size: what it printed, and where it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by" / "it"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["demo", "--preset", "tiny", "--steps", "6", "--techniques", "checkpointing,micro-batching",
                     "--out", str(folder)])  # fmt: skip
    assert code == 0
    return printed.getvalue(), folder


def test_the_demo_prints_one_table_of_both_runs(ran):
    printed, folder = ran
    for word in ("parameters", "activations", "peak memory", "predicted peak", "time per step", "validation loss"):
        assert printed.count(word) >= 1, word
    assert "plain Lightning" in printed and "micro-batching" in printed
    assert "GPU available" not in printed
    assert f"It took {json.loads((folder / 'results.json').read_text())['seconds']:.0f} s in all." in printed


def test_the_techniques_of_the_demo_lower_the_peak_and_leave_the_losses_as_they_were(ran):
    plain, other = json.loads((ran[1] / "results.json").read_text())["runs"]
    assert other["measured"]["peak_bytes"] < 0.8 * plain["measured"]["peak_bytes"]
    assert len(plain["training_losses"]) == len(other["training_losses"]) == 6
    assert other["training_losses"] == pytest.approx(plain["training_losses"], rel=1e-4)
    assert other["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-4)
    assert plain["training_losses"][-1] < plain["training_losses"][0]


def test_the_demo_predicts_what_it_measures(ran):
    for run in json.loads((ran[1] / "results.json").read_text())["runs"]:
        assert run["predicted"]["peak_bytes"] == pytest.approx(run["measured"]["peak_bytes"], rel=0.02)
        assert sum(run["measured"]["by_category"].values()) == run["measured"]["peak_bytes"]


def test_the_demo_draws_both_timelines_into_one_picture(ran):
    pytest.importorskip("matplotlib")
    assert (ran[1] / "timelines.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_ends_with_a_pruned_and_quantized_module_that_loads_by_itself(ran):
    printed, folder = ran
    report = json.loads((folder / "results.json").read_text())["compression"]
    assert report["disk_bytes_after"] < 0.35 * report["disk_bytes_before"]
    assert report["eligible_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["metrics_after"]["val_loss"] == pytest.approx(report["metrics_before"]["val_loss"], rel=0.2)
    assert isinstance(memopt.load_compressed(folder / "compressed"), GPT)
    assert "on disk" in printed and "half of its weights" in printed


@pytest.mark.slow
def test_the_same_seed_gives_the_same_demo_and_another_seed_another(tmp_path):
    def losses(seed: str) -> list[float]:
        main(["demo", "--preset", "tiny", "--steps", "2", "--techniques", "micro-batching", "--seed", seed,
              "--out", str(tmp_path / seed)])  # fmt: skip
        return json.loads((tmp_path / seed / "results.json").read_text())["runs"][0]["training_losses"]

    first = losses("3")
    assert losses("3") == first != losses("4")


@pytest.mark.slow
def test_without_matplotlib_the_demo_says_that_there_is_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_memopt.demo.show.find_spec", lambda name: None)
    assert (
        main(["demo", "--preset", "tiny", "--steps", "1", "--techniques", "micro-batching", "--out", str(tmp_path)])
        == 0
    )
    assert "No picture: matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
