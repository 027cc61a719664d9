"""Checkpoints of data parallel training: plain files, read by any strategy at any number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.distributed import run_on_ranks
from tests.strategies.parity import STRATEGIES, fit_zoo
from tests.zoo import ZOO

NAME = "gpt2"
STEPS, SAVED_AT = 6, 3
PLAIN = "auto"


class _SaveDuringAndAfter(Callback):
    """Saves in mid-training as a ModelCheckpoint does, and at the end when the strategy has been torn down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.folder / "during.ckpt")

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.folder / "after.ckpt")


def _save(folder: Path, strategy: str, ranks: int) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    return _fit(strategy, ranks, extra=[_SaveDuringAndAfter(folder)])


def _resume(folder: Path, strategy: str, ranks: int) -> np.ndarray:
    return _fit(strategy, ranks, ckpt_path=folder / "during.ckpt")


def _fit(strategy: str, ranks: int, **options: Any) -> np.ndarray:
    # One batch again and again: a plain DataLoader starts over when Lightning resumes.
    return fit_zoo(
        ZOO[NAME], ranks, STEPS, repeat_first_batch=True, strategy=strategy, accumulate_grad_batches=1, **options
    ).losses


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of checkpoints by the strategy that wrote them, and the losses of the uninterrupted run."""
    root = tmp_path_factory.mktemp("checkpoints")

    def save_each() -> list[np.ndarray]:
        return [_save(root / strategy, strategy, 2) for strategy in STRATEGIES]

    losses = run_on_ranks(save_each, 2, deadline_seconds=120)[0]
    plain = run_on_ranks(lambda: _save(root / PLAIN, PLAIN, 1), 1)[0]
    for of_strategy in losses:
        np.testing.assert_allclose(of_strategy, plain, rtol=1e-5)
    return root, plain


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_holds_plain_whole_tensors_under_the_names_the_user_wrote(checkpoints, strategy):
    root, _ = checkpoints
    plain = torch.load(root / PLAIN / "after.ckpt", weights_only=True)
    saved = torch.load(root / strategy / "after.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(plain["state_dict"])
    for name, weight in plain["state_dict"].items():
        assert type(saved["state_dict"][name]) is torch.Tensor
        torch.testing.assert_close(saved["state_dict"][name], weight, rtol=1e-4, atol=1e-4, msg=name)
    ZOO[NAME].build().load_state_dict(saved["state_dict"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tied_weights_are_saved_once(checkpoints, strategy):
    root, _ = checkpoints
    weights = torch.load(root / strategy / "during.ckpt", weights_only=True)["state_dict"]
    tied = weights["model.lm_head.weight"], weights["model.transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_optimizer_state_is_that_of_the_plain_optimizer(checkpoints, strategy):
    root, _ = checkpoints
    (plain,) = torch.load(root / PLAIN / "after.ckpt", weights_only=True)["optimizer_states"]
    (saved,) = torch.load(root / strategy / "after.ckpt", weights_only=True)["optimizer_states"]
    assert saved["param_groups"] == plain["param_groups"]
    assert list(saved["state"]) == list(plain["state"])
    for key, entry in plain["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(saved["state"][key][name], value, rtol=1e-3, atol=1e-5)


def test_each_strategy_resumes_from_a_plain_checkpoint_and_from_another_strategys(checkpoints):
    root, plain = checkpoints
    others = (*STRATEGIES[1:], STRATEGIES[0])
    pairs = [*((PLAIN, reader) for reader in STRATEGIES), *zip(STRATEGIES, others, strict=True)]

    def resume_each() -> list[np.ndarray]:
        return [_resume(root / writer, reader, 2) for writer, reader in pairs]

    resumed = run_on_ranks(resume_each, 2, deadline_seconds=180)[0]
    for pair, losses in zip(pairs, resumed, strict=True):
        np.testing.assert_allclose(losses, plain[-len(losses) :], rtol=1e-5, err_msg=" to ".join(pair))
        assert len(losses) == STEPS - SAVED_AT


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_resume_with_the_losses_of_the_uninterrupted_run(checkpoints, ranks):
    root, plain = checkpoints
    reader = PLAIN if ranks == 1 else "memopt_zero3"
    writers = STRATEGIES if ranks == 1 else STRATEGIES[::3]

    def resume_each() -> list[np.ndarray]:
        return [_resume(root / writer, reader, ranks) for writer in writers]

    for losses in run_on_ranks(resume_each, ranks, deadline_seconds=180)[0]:
        assert len(losses) == STEPS - SAVED_AT
        np.testing.assert_allclose(losses, plain[-len(losses) :], rtol=1e-5)
