"""Recipes as data, and the command that follows them."""

import json
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_memopt import load_compressed
from lightning_memopt.cli import main
from lightning_memopt.compression import executorch, onnx
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.recipe import Recipe
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.demo.model import GPT
from tests.checkpoints.disk import small_disk


class Net(pl.LightningModule):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        self.example_input_array = torch.ones(2, 16)

    def forward(self, x):
        return self.net(x)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Net(128))
    path = tmp_path / "net.ckpt"
    trainer.save_checkpoint(path)
    return path


def _run(checkpoint, recipe: str, tmp_path, *more: str) -> int:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    name = f"{Net.__module__}:Net"
    return main(
        ["compress", str(checkpoint), "--module", name, "--recipe", str(path), "--out", str(tmp_path / "out"), *more]
    )


def test_a_mixed_recipe_packs_each_layer_once_in_the_first_scheme_that_names_it():
    module = Net(128)
    recipe = Recipe.from_dict({"quantize": [{"scheme": "nf4", "include": "net.2"}, "int8"]})
    report = recipe.apply(module)
    by_name = {change.name: change for change in report.modules}
    assert by_name["net.2"].bytes_after < 0.2 * by_name["net.2"].bytes_before
    assert 0.24 < by_name["net.0"].bytes_after / by_name["net.0"].bytes_before < 0.4
    assert not any(name.endswith("weight") for name in report.skipped)


def test_a_table_of_which_rows_are_sliced_is_read_in_inference_mode_too():
    module, ids = GPT(1, 64, 4, 32).eval(), torch.arange(16)[None]
    wanted = module(ids).detach()
    Recipe.from_dict({"quantize": "int8"}).apply(module)
    with torch.inference_mode():
        torch.testing.assert_close(module(ids), wanted, rtol=0.1, atol=0.05)


def test_steps_are_done_in_order_and_zeros_survive_quantization():
    module = Net(128)
    report = Recipe.from_dict({"prune": {"amount": 0.75, "scope": "global"}, "quantize": "int8"}).apply(module)
    assert report.eligible_sparsity == pytest.approx(0.75, abs=1e-3)
    assert report.sparsity > 0.7 and report.disk_ratio < report.ratio


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "names some of prune"),
        ({"quantize": []}, "asks for nothing"),
        ({"distil": 1}, "distil is no step"),
        ({"prune": 0.5}, "prune takes arguments"),
        ({"prune": {}}, "prune lacks amount"),
        ({"prune": {"amount": 0.5, "speed": 1}}, "speed is no argument of prune"),
        ({"quantize": 8}, "quantize is a scheme"),
        ({"quantize": [{"include": "a"}]}, "quantize lacks scheme"),
        ({"quantize": {"scheme": ["int8"]}}, "scheme of quantize is a word"),
        ({"prune": {"amount": 0.5}, "quantize": "int3"}, "int3"),
        ({"prune": {"amount": 0.5}, "cluster": {"n": 1}}, "n=1 is no number"),
        ({"prune": {"amount": 1.5, "method": "structured"}}, "1.5 is no share"),
        ({"prune": {"amount": 0.5, "method": "n:m"}}, "'structured'; n of m is said by a pattern, such as pattern"),
        ({"prune": {"amount": 0.5, "method": "structured", "scope": "global"}}, "scope means nothing with method"),
        ({"prune": {"amount": 0.5, "seed": "x"}}, "seed of prune is a whole number"),
        ({"prune": {"amount": 0.5, "embeddings": "no"}}, "embeddings of prune is true or false, not 'no'"),
        ({"module": "my.models:Net"}, "names some of prune"),
        ({"module": 3, "quantize": "int8"}, "module is a class"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_before_anything_is_done(content, said):
    with pytest.raises(ValueError, match=said):
        Recipe.from_dict(content)


def test_a_pattern_that_yaml_takes_for_a_time_is_read_as_a_pattern(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("prune: {amount: 0.5, pattern: 2:4}")
    assert Recipe.from_yaml(path).prune["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("quantize: int8\nprune: {amount: 0.5}\nquantize: nf4", "quantize"),
        ("prune: {amount: 0.5, amount: 0.6}", "amount"),
    ],
)
def test_a_key_that_a_file_has_twice_is_refused_by_name(text, key, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml has '{key}' twice"):
        Recipe.from_yaml(path)


def test_a_report_goes_to_a_folder_that_is_made_and_not_over_one(checkpoint, tmp_path, capsys):
    assert _run(checkpoint, "quantize: int8", tmp_path, "--report", str(tmp_path)) == 2
    assert "is a folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert _run(checkpoint, "quantize: int8", tmp_path, "--report", str(tmp_path / "deep" / "report.json")) == 0
    assert (tmp_path / "deep" / "report.json").exists()


def test_the_command_writes_a_folder_that_computes_nearly_the_same(checkpoint, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert _run(checkpoint, "quantize: int8", tmp_path, "--report", str(report)) == 0
    loaded = load_compressed(tmp_path / "out")
    x = torch.randn(8, 16)
    torch.testing.assert_close(loaded(x), Net.load_from_checkpoint(checkpoint).eval()(x), rtol=0.05, atol=0.02)
    assert json.loads(report.read_text())["disk_bytes_after"] == sum(
        file.stat().st_size for file in (tmp_path / "out").iterdir()
    )
    assert "in memory" in capsys.readouterr().out


def test_the_command_prunes_by_structure_and_the_small_module_loads(checkpoint, tmp_path):
    pytest.importorskip("torch_pruning")
    assert _run(checkpoint, "prune: {amount: 0.5, method: structured}", tmp_path) == 0
    loaded = load_compressed(tmp_path / "out")
    assert loaded.net[2].weight.shape == (64, 64) and loaded.net[2].in_features == 64
    assert sum(s.bytes for s in measure_sizes(loaded).values()) < 0.35 * sum(
        s.bytes for s in measure_sizes(Net(128)).values()
    )
    assert loaded(torch.ones(2, 16)).shape == (2, 4)


def test_the_command_says_in_one_line_what_is_wrong(checkpoint, tmp_path, capsys):
    for recipe, word in (
        ("quantize: int3", "int3"),
        ("quantize: [", "no YAML"),
        ("prune: {amount: 2}", "2"),
        ("prune: {amount: 0.5, method: structured, scope: global}", "scope"),
    ):
        assert _run(checkpoint, recipe, tmp_path) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1
    assert _run(tmp_path / "none.ckpt", "quantize: int8", tmp_path) == 2
    assert "none.ckpt" in capsys.readouterr().err


class Unknown:
    """What no checkpoint is to bring with it."""


def test_a_checkpoint_that_is_damaged_or_holds_code_is_refused_in_one_line(checkpoint, tmp_path, capsys):
    content = checkpoint.read_bytes()
    for damage in (b"", content[:10], content[: len(content) // 2], b"no checkpoint"):
        checkpoint.write_bytes(damage)
        assert _run(checkpoint, "quantize: int8", tmp_path) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and len(said) > 40
    torch.save({"state_dict": {}, "hyper_parameters": {"width": Unknown()}}, checkpoint)
    assert _run(checkpoint, "quantize: int8", tmp_path) == 2
    assert "could run code" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_before_anything_is_done(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    checkpoint.unlink()  # it would be asked for next
    assert _run(checkpoint, "quantize: int8", tmp_path) == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_disk_that_is_full_is_said_in_one_line_and_leaves_nothing(checkpoint, tmp_path, capsys):
    with small_disk(tmp_path / "small", 16 * 1024) as folder:
        path = tmp_path / "recipe.yaml"
        path.write_text("quantize: int8")
        name = f"{Net.__module__}:Net"
        out = ["--recipe", str(path), "--out", str(folder / "out")]
        assert main(["compress", str(checkpoint), "--module", name, *out]) == 2
        said = capsys.readouterr().err
        assert "pace left" in said and said.count("\n") == 1
        assert not list(folder.iterdir())


def test_the_command_writes_onnx_beside_the_folder_and_it_computes_what_the_folder_does(checkpoint, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert _run(checkpoint, "quantize: int8", tmp_path, "--onnx", str(tmp_path / "deep" / "net.onnx")) == 0
    session = onnxruntime.InferenceSession(tmp_path / "deep" / "net.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(2, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = load_compressed(tmp_path / "out")(x).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_the_command_writes_an_executorch_program_of_what_it_made(checkpoint, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(executorch, "require_executorch", lambda: None)
    monkeypatch.setattr(executorch, "export_executorch", lambda *arguments: written.append(arguments))
    assert _run(checkpoint, "quantize: int8", tmp_path, "--executorch", str(tmp_path / "net.pte")) == 0
    ((module, inputs, path),) = written
    assert isinstance(module.net[2].weight, PackedWeight) and path == str(tmp_path / "net.pte")
    assert torch.equal(inputs, torch.ones(2, 16))


@pytest.mark.parametrize(("option", "package"), [("onnx", "onnxruntime"), ("executorch", "executorch")])
def test_a_program_for_which_a_package_is_missing_is_refused_before_anything_is_done(
    option, package, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.runtime", raising=False)
    assert _run(checkpoint, "quantize: int8", tmp_path, f"--{option}", str(tmp_path / "net")) == 2
    said = capsys.readouterr().err
    assert f"needs {package}" in said and f"lightning-memopt[{option}]" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["onnx", "executorch"])
def test_a_program_that_cannot_be_written_is_refused_before_anything_is_done(
    option, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(executorch, "require_executorch", lambda: None)
    monkeypatch.setattr(onnx, "require_onnx", lambda: None)
    assert _run(checkpoint, "quantize: int8", tmp_path, f"--{option}", str(tmp_path)) == 2
    assert "is a folder" in capsys.readouterr().err
    monkeypatch.setattr(Net, "example_input_array", property(lambda _: None, lambda *_: None), raising=False)
    assert _run(checkpoint, "quantize: int8", tmp_path, f"--{option}", str(tmp_path / "net")) == 2
    assert f"--{option} needs inputs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
