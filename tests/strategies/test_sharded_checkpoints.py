"""Sharded and asynchronous checkpoints of every strategy, read by every other and by plain Lightning."""

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt import AtomicCheckpointIO, DataParallelStrategy, full_state_dict, latest_checkpoint
from lightning_memopt.checkpoints.atomic import is_whole
from lightning_memopt.checkpoints.consolidate import consolidate
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.strategies.hybrid import HybridStrategy
from lightning_memopt.strategies.pipeline import PipelineParallelStrategy
from lightning_memopt.strategies.tensor import TensorParallelStrategy
from tests.checkpoints.disk import small_disk
from tests.distributed import run_on_ranks
from tests.parity import quiet_trainer, train
from tests.strategies.parity import fit_zoo
from tests.zoo import ZOO, slow_where

NAME = "gpt2"
STEPS, SAVED_AT = 4, 2
PLAIN = "plain"


class Row(NamedTuple):
    """A strategy: how a user makes it, which of so many ranks share a batch, and at how many it saves."""

    make: Callable[..., Any]
    sizes: Callable[[int], MeshSizes] = lambda ranks: MeshSizes(data=ranks)
    ranks: int = 2


ROWS: dict[str, Row] = {
    PLAIN: Row(lambda **options: "auto"),
    "memopt_ddp": Row(lambda **options: DataParallelStrategy("none", **options)),
    "memopt_zero1": Row(lambda **options: DataParallelStrategy("optimizer", **options)),
    "memopt_zero2": Row(lambda **options: DataParallelStrategy("gradients", **options)),
    "memopt_zero3": Row(lambda **options: DataParallelStrategy("parameters", **options)),
    "memopt_tp": Row(lambda **options: TensorParallelStrategy(**options), lambda ranks: MeshSizes(tensor=ranks)),
    "memopt_pp": Row(lambda **options: PipelineParallelStrategy(**options), lambda ranks: MeshSizes(pipeline=ranks)),
    "memopt_hybrid": Row(
        lambda **options: HybridStrategy(shard=2, tensor=2, **options), lambda ranks: MeshSizes(shard=2, tensor=2), 4
    ),
}
OURS = [name for name in ROWS if name != PLAIN]
ASYNC = "memopt_zero3"


def _can_be(name: str, ranks: int) -> bool:
    """The module has two blocks and so two stages, and the hybrid is one of four ranks."""
    return ranks == ROWS[name].ranks if name in ("memopt_pp", "memopt_hybrid") else True


class _SaveDuringAndAfter(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.folder / "during.ckpt")

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.folder / "after.ckpt")


def _fit(name: str, ranks: int, steps: int = STEPS, *, save: str = "full", **options: Any) -> np.ndarray:
    # One batch again and again: a plain DataLoader starts over when Lightning resumes.
    row = ROWS[name]
    return fit_zoo(
        ZOO[NAME],
        ranks,
        steps,
        sizes=row.sizes(ranks),
        repeat_first_batch=True,
        strategy=row.make(save=save),
        accumulate_grad_batches=1,
        **options,
    ).losses


def _save(folder: Path, name: str, ranks: int, save: str) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    return _fit(name, ranks, save=save, extra=[_SaveDuringAndAfter(folder)])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of checkpoints by the strategy that wrote them at 2 ranks, and the losses on one device."""
    root = tmp_path_factory.mktemp("sharded")
    plain = run_on_ranks(lambda: _save(root / PLAIN, PLAIN, 1, "full"), 1)[0]

    for ranks in (2, 4):
        names = [name for name in OURS if ROWS[name].ranks == ranks]

        def save_each(names: list[str] = names, ranks: int = ranks) -> list[np.ndarray]:
            return [_save(root / name, name, ranks, "async" if name == ASYNC else "sharded") for name in names]

        for losses in run_on_ranks(save_each, ranks, deadline_seconds=120)[0]:
            np.testing.assert_allclose(losses, plain, rtol=1e-5)
    return root, plain


def _assert_resumes(checkpoint: Path, plain: np.ndarray, names: list[str], ranks: int) -> None:
    def resume_each() -> list[np.ndarray]:
        return [_fit(name, ranks, ckpt_path=checkpoint) for name in names]

    for name, losses in zip(names, run_on_ranks(resume_each, ranks, deadline_seconds=120)[0], strict=True):
        np.testing.assert_allclose(losses, plain[SAVED_AT:], rtol=1e-5, err_msg=f"{checkpoint} by {name}")


@pytest.mark.parametrize("name", OURS)
def test_a_sharded_checkpoint_has_the_weights_that_one_device_saves(checkpoints, name):
    root, _ = checkpoints
    for file in ("during.ckpt", "after.ckpt"):
        assert (root / name / file).is_dir()
        saved, plain = full_state_dict(root / name / file), full_state_dict(root / PLAIN / file)
        assert list(saved) == list(plain)
        for key, weight in plain.items():
            torch.testing.assert_close(saved[key], weight, rtol=1e-4, atol=1e-4, msg=key)
    assert not [entry for entry in os.listdir(root / name) if entry.startswith(".")]


@pytest.mark.parametrize(
    "name", slow_where(OURS, [name for name in OURS if name not in ("memopt_zero3", "memopt_pp")])
)
def test_plain_lightning_resumes_from_the_one_file_that_is_made_of_it(checkpoints, tmp_path, name):
    root, plain = checkpoints
    for file in ("after.ckpt", "during.ckpt"):
        consolidate(root / name / file, tmp_path / file)
        (saved,) = torch.load(tmp_path / file, weights_only=True)["optimizer_states"]
        (expected,) = torch.load(root / PLAIN / file, weights_only=True)["optimizer_states"]
        assert saved["param_groups"] == expected["param_groups"]
        assert list(saved["state"]) == list(expected["state"])
        for key, entry in expected["state"].items():
            for part, value in entry.items():
                torch.testing.assert_close(saved["state"][key][part], value, rtol=1e-3, atol=1e-5)
    if name == OURS[0]:
        _assert_resumes(tmp_path / "during.ckpt", plain, [PLAIN], 1)


def test_another_strategy_resumes_from_a_sharded_checkpoint(checkpoints):
    root, plain = checkpoints
    for writer, names in {ASYNC: ["memopt_ddp", "memopt_tp"], "memopt_hybrid": ["memopt_zero3"]}.items():
        _assert_resumes(root / writer / "during.ckpt", plain, names, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", OURS)
def test_all_strategies_resume_from_a_sharded_checkpoint_at_any_number_of_ranks(checkpoints, name, ranks):
    root, plain = checkpoints
    readers = [reader for reader in OURS if _can_be(reader, ranks)]
    _assert_resumes(root / name / "during.ckpt", plain, readers, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("save", ["sharded", "async"])
@pytest.mark.parametrize(("name", "ranks"), [(name, n) for name in OURS for n in (1, 2, 4) if _can_be(name, n)])
def test_any_number_of_ranks_saves(checkpoints, tmp_path, name, ranks, save):
    _, plain = checkpoints
    losses = run_on_ranks(lambda: _save(tmp_path, name, ranks, save), ranks)[0]
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    _assert_resumes(tmp_path / "during.ckpt", plain, ["memopt_zero1"], 2)


def test_a_plain_trainer_resumes_from_the_directory_with_the_plugin(checkpoints):
    root, plain = checkpoints

    def resume() -> np.ndarray:
        return _fit(PLAIN, 1, ckpt_path=root / OURS[0] / "during.ckpt", plugins=[AtomicCheckpointIO()])

    np.testing.assert_allclose(run_on_ranks(resume, 1)[0], plain[SAVED_AT:], rtol=1e-5)


@pytest.mark.parametrize("save", ["sharded", "async"])
def test_model_checkpoint_keeps_the_newest_and_the_last(tmp_path, save):
    def fit() -> None:
        keep = ModelCheckpoint(
            tmp_path, "{step}", monitor="step", mode="max", save_top_k=1, save_last=True, every_n_train_steps=1
        )
        _fit("memopt_zero3", 2, 3, save=save, extra=[keep], enable_checkpointing=True)

    run_on_ranks(fit, 2)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=3.ckpt"]
    for name in os.listdir(tmp_path):
        assert is_whole(tmp_path / name)
    assert latest_checkpoint(tmp_path) is not None


@pytest.mark.parametrize("save", ["full", "sharded", "async"])
def test_a_full_disk_fails_on_all_ranks_and_leaves_the_older_checkpoint(tmp_path, save):
    class SaveTwice(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.save_checkpoint(disk / f"{trainer.global_step}.ckpt")

    def fit() -> str:
        with pytest.raises(OSError, match="disk is full") as caught:
            _fit("memopt_zero3", 2, 2, save=save, extra=[SaveTwice()])
        return str(caught.value)

    # One fits and two do not: 0.54 MB as a file, and 1.0 MB as shards, since each tensor is a file within the file.
    with small_disk(tmp_path / "disk", 900_000 if save == "full" else 1_500_000) as disk:
        for said in run_on_ranks(fit, 2, deadline_seconds=60):
            assert str(disk / "2.ckpt") in said
            assert "bytes" in said and "free" in said
        assert os.listdir(disk) == ["1.ckpt"]
        assert latest_checkpoint(disk) == str(disk / "1.ckpt")
        assert full_state_dict(disk / "1.ckpt")


def test_the_users_own_checkpoint_plugin_is_kept():
    plugin = pl.plugins.io.TorchCheckpointIO()
    assert DataParallelStrategy(checkpoint_io=plugin).checkpoint_io is plugin
    assert isinstance(DataParallelStrategy().checkpoint_io, AtomicCheckpointIO)


def test_a_way_of_saving_that_there_is_not_is_refused():
    with pytest.raises(MisconfigurationException, match="save='shards' is none of 'full', 'sharded', 'async'"):
        DataParallelStrategy(save="shards")


class WithNamespace(type(ZOO["mlp"].build())):
    def __init__(self, args: Any = None) -> None:
        super().__init__(0.0)
        self.save_hyperparameters()


def test_objects_beside_the_tensors_are_read_only_where_the_user_trusts_the_checkpoint(tmp_path):
    path = str(tmp_path / "saved")

    def fit() -> int:
        options = {"devices": 2, "strategy": DataParallelStrategy("parameters", save="sharded")}
        module, loader = WithNamespace(Namespace(width=1)), ZOO["mlp"].loader(4)
        train(module, loader, steps=2, **options).trainer.save_checkpoint(path)
        with pytest.raises(ValueError, match="If you trust it"):
            full_state_dict(path)
        trainer = quiet_trainer(4, devices=2, strategy=DataParallelStrategy("parameters", save="sharded"))
        trainer.fit(WithNamespace(), loader, ckpt_path=path, weights_only=False)
        return trainer.global_step

    assert run_on_ranks(fit, 2) == [4, 4]
