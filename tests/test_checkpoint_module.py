"""The module of a checkpoint is built of the class that the user names, or of the one that was recorded."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_memopt import PruneOnFitEnd, load_compressed
from lightning_memopt.checkpoint_module import load_module
from lightning_memopt.checkpoints.sharded import REST
from lightning_memopt.cli import main
from lightning_memopt.models.class_names import class_name
from tests.distributed import run_on_ranks

LIGHTNINGS = "lightning.pytorch.cli.instantiate_module"


class Net(pl.LightningModule):
    def __init__(self, width: int = 8, act: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._build(width, act or nn.ReLU())

    def _build(self, width: int, act: nn.Module) -> None:
        self.net = nn.Sequential(nn.Linear(16, width), act, nn.Linear(width, 64))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(4, 16))


class KeepsNoHyperparameters(Net):
    def __init__(self, width: int, act: nn.Module) -> None:
        pl.LightningModule.__init__(self)
        self._build(width, act)


class NotBuilt:
    def __init__(self) -> None:
        raise AssertionError("a class that is no module was built")


@pytest.fixture
def saved(tmp_path):
    """Saves a checkpoint of a ``Net`` 32 wide, with changes to what it holds; returns its path."""

    def save(**changes) -> str:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(Net(32))
        path = tmp_path / "net.ckpt"
        trainer.save_checkpoint(path)
        held = {**torch.load(path, weights_only=True), **changes}
        torch.save({key: value for key, value in held.items() if value is not None}, path)
        return str(path)

    return save


def _compress(checkpoint, tmp_path, recipe: str = "quantize: int8", *more: str) -> int:
    (tmp_path / "recipe.yaml").write_text(recipe)
    return main(
        [
            "compress",
            str(checkpoint),
            "--recipe",
            str(tmp_path / "recipe.yaml"),
            "--out",
            str(tmp_path / "out"),
            *more,
        ]
    )


@pytest.mark.parametrize("cls", [Net, KeepsNoHyperparameters])
def test_a_checkpoint_of_lightnings_cli_is_compressed_without_its_class_being_named(cls, tmp_path):
    from lightning.pytorch.cli import LightningCLI

    path = f"{cls.__module__}.{cls.__name__}"
    shape = ["--model.width", "32", "--model.act", "torch.nn.Tanh"]
    options = {"accelerator": "cpu", "max_steps": "1", "enable_progress_bar": "false", "default_root_dir": tmp_path}
    trainer = [f"--trainer.{name}={value}" for name, value in options.items()]
    LightningCLI(pl.LightningModule, subclass_mode_model=True, args=["fit", "--model", path, *shape, *trainer])
    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    module = load_module(str(checkpoint))
    assert type(module) is cls and isinstance(module.net[1], nn.Tanh) and not module.training
    assert torch.equal(module.net[0].weight, torch.load(checkpoint)["state_dict"]["net.0.weight"])
    assert _compress(checkpoint, tmp_path) == 0


def test_callbacks_that_compress_note_the_class_in_checkpoints(tmp_path):
    callback = PruneOnFitEnd(0.5)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[callback], default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(32))
    assert _compress(trainer.checkpoint_callback.best_model_path, tmp_path) == 0
    assert type(load_compressed(tmp_path / "out")) is Net


class OwnsScale(Net):
    """Has a parameter of its own, so that FSDP2 shards the module itself, and gives it another class."""

    def __init__(self) -> None:
        super().__init__(32)
        self.scale = nn.Parameter(torch.ones(16))

    def training_step(self, batch, batch_idx):
        return self.net(batch * self.scale).square().mean()


class Sees(pl.Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.seen = type(pl_module).__name__, checkpoint["lightning_memopt"]["class"]


def _note_of_two(folder) -> tuple[str, str]:
    sees = Sees()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="memopt_zero3", max_steps=1, callbacks=[PruneOnFitEnd(0.5), sees],
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(OwnsScale())
    return sees.seen


@pytest.mark.distributed
def test_the_class_that_is_noted_is_the_users_where_shards_have_another(tmp_path):
    wanted = ("FSDPOwnsScale", class_name(OwnsScale))
    assert run_on_ranks(_note_of_two, 2, tmp_path, deadline_seconds=120) == [wanted, wanted]


def test_a_recipe_may_name_the_class(saved, tmp_path):
    assert _compress(saved(), tmp_path, f"module: {class_name(Net)}\nquantize: int8") == 0


class Renamed(Net):
    """As :class:`Net`."""


@pytest.mark.parametrize("recorded", [f"{__name__}.Net", "__main__.Net", "gone.Net"])
def test_what_the_user_names_is_preferred_to_what_is_recorded(saved, recorded):
    path = saved(hyper_parameters={"width": 32, "_class_path": recorded, "_instantiator": LIGHTNINGS})
    assert type(load_module(path, class_name(Renamed))) is Renamed


def test_a_checkpoint_that_names_no_class_is_refused_with_how_to_name_it(saved, tmp_path, capsys):
    for hyper_parameters, said in (({"width": 32}, "does not name its class"), (None, "does not name its class"),
                                   ({"_class_path": "__main__.Net"}, "__main__:Net, which the script")):  # fmt: skip
        assert _compress(saved(hyper_parameters=hyper_parameters), tmp_path) == 2
        error = capsys.readouterr().err
        assert said in error and "--module package.module:Class" in error and "in the recipe" in error
        assert error.count("\n") == 1


def test_what_a_checkpoint_names_is_not_run_where_it_is_no_part_of_lightning_and_no_module(saved):
    with pytest.raises(ValueError, match=r"'os\.system', which is no part of Lightning"):
        load_module(saved(hyper_parameters={"width": 32, "_instantiator": "os.system"}), class_name(Net))
    with pytest.raises(ValueError, match="NotBuilt is no LightningModule"):
        load_module(saved(lightning_memopt={"class": class_name(NotBuilt)}))


class IgnoresItsPart(Net):
    def __init__(self, width: int, act: nn.Module) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters(ignore=["act"])
        self._build(width, act)


def test_what_hyperparameters_leave_out_is_built_as_the_config_of_the_run_says(saved, tmp_path):
    path = saved(hyper_parameters={"width": 32})
    model = "model:\n  width: 8\n  act:\n    class_path: torch.nn.Tanh\n"
    (tmp_path / "config.yaml").write_text(f"# lightning.pytorch==2.6.6\ntrainer: {{}}\n{model}")
    module = load_module(path, class_name(IgnoresItsPart))
    assert isinstance(module.net[1], nn.Tanh) and module.net[0].out_features == 32
    (tmp_path / "config.yaml").write_text(
        f"# lightning.pytorch==2.6.6\ntrainer: {{}}\n{model.replace('width', 'wide')}"
    )
    with pytest.raises(ValueError, match="missing 1 required positional argument: 'act'"):
        load_module(path, class_name(IgnoresItsPart))


def test_a_config_that_is_not_of_lightnings_cli_says_nothing_of_how_the_module_is_built(saved, tmp_path):
    path = saved(hyper_parameters=None, state_dict=Net().state_dict())
    (tmp_path / "config.yaml").write_text("trainer: {}\nmodel: {_target_: my.Net, width: 3}\n")
    assert load_module(path, class_name(Net)).net[0].out_features == 8
    with pytest.raises(ValueError, match="does not name its class"):
        load_module(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state_dict": None}, "it has no state_dict"),
        ({"state_dict": None, "pytorch-lightning_version": None}, "no state_dict and no pytorch-lightning_version"),
        ({"state_dict": {"net.0.weight": torch.ones(3, 3)}}, "does not load into"),
        (
            {"state_dict": {"net.0.weight": torch.ones(3, 3)}},
            "structured pruning made smaller is kept by export_path=",
        ),
        ({"hyper_parameters": {"width": "wide"}}, "does not load into"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_the_class_is_refused_in_one_line(saved, changes, said, tmp_path, capsys):
    assert _compress(saved(**changes), tmp_path, "quantize: int8", "--module", class_name(Net)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_sharded_checkpoint_is_refused_with_what_makes_one_file_of_it(tmp_path, capsys):
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "sharded.ckpt" / REST).touch()
    assert _compress(tmp_path / "sharded.ckpt", tmp_path) == 2
    assert "lightning-memopt consolidate" in capsys.readouterr().err


def test_what_a_users_constructor_raises_is_said_with_its_type(saved, tmp_path, capsys, monkeypatch):
    checkpoint = saved()
    monkeypatch.setattr(Net, "_build", lambda *_: {}["no such key"])
    assert _compress(checkpoint, tmp_path, "quantize: int8", "--module", class_name(Net)) == 2
    assert "KeyError: 'no such key'" in capsys.readouterr().err


def test_a_class_is_found_in_the_folder_where_the_command_is_run(saved, tmp_path, monkeypatch):
    (tmp_path / "my_nets_here.py").write_text(f"from {__name__} import Net\n\nclass Mine(Net): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert _compress(saved(), tmp_path, "{module: 'my_nets_here:Mine', quantize: int8}") == 0
    assert type(load_compressed(tmp_path / "out")).__name__ == "Mine"
