import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt import ActivationCheckpointing, ActivationOffload
from tests.parity import assert_parity, train
from tests.zoo import ZOO, cases, slow_where


@pytest.mark.parametrize("name", cases())
def test_offloading_to_disk_trains_the_zoo_with_dropout_bit_for_bit(name: str, tmp_path: Path) -> None:
    offload = ActivationOffload("disk", min_bytes=2048, directory=tmp_path)
    assert_parity(ZOO[name], [offload], dropout=0.1, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


EITHER_ORDER = [
    ("gpt2", "full", False),
    ("gan", "full", True),
    ("gpt2", "selective", True),
    ("cnn", "selective", False),
]


@pytest.mark.parametrize(("name", "policy", "offload_first"), slow_where(EITHER_ORDER, EITHER_ORDER[2:]))
def test_offloading_composes_with_checkpointing_in_either_order(name, policy, offload_first, tmp_path: Path) -> None:
    callbacks = [ActivationOffload("disk", min_bytes=4096, directory=tmp_path), ActivationCheckpointing(policy)]
    order = callbacks if offload_first else callbacks[::-1]
    assert_parity(ZOO[name], order, dropout=0.1, rtol=0, atol=0)


class Look(Callback):
    """Counts files in a folder at each batch end, and raises at the third."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[int] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, *args: object) -> None:
        self.saved.append(len(list(self.folder.rglob("*.bin"))))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("stop here")


def test_files_hold_the_activations_between_forward_and_backward_and_are_gone_after_an_exception(tmp_path) -> None:
    look = Look(tmp_path)
    with pytest.raises(RuntimeError, match="stop here"):
        train(
            ZOO["gpt2"].build(), ZOO["gpt2"].loader(),
            callbacks=[ActivationOffload("disk", min_bytes=0, directory=tmp_path), look],
        )  # fmt: skip
    assert len(look.saved) == 3
    assert min(look.saved) > 30
    assert look.saved[0] == look.saved[2], "files of earlier steps are still there"
    assert not list(tmp_path.iterdir())


def test_no_hook_stays_after_fit_or_a_skipped_batch(tmp_path: Path) -> None:
    class Skip(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: object, batch: object, batch_idx: int) -> int:
            return -1 if batch_idx == 2 else 0

    module = ZOO["mlp"].build()
    offload = ActivationOffload("disk", min_bytes=0, directory=tmp_path)
    train(module, ZOO["mlp"].loader(), callbacks=[offload, Skip()], steps=6)
    out = module(next(iter(ZOO["mlp"].loader()))[0])
    assert not list(tmp_path.iterdir())
    out.sum().backward()


def test_offloading_to_the_cpu_on_a_cpu_is_refused_before_the_first_step() -> None:
    with pytest.raises(MisconfigurationException, match=r"MLP is on the CPU, .*use to='disk'"):
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(), callbacks=[ActivationOffload("cpu")])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"to": "tape"}, "to='tape' is not a place"),
        ({"min_bytes": -1}, "min_bytes=-1 is not a number of bytes"),
        ({"to": "disk", "directory": "no/such"}, "'no/such' is not an existing folder"),
        ({"to": "cpu", "directory": "."}, "was given with to='cpu'"),
    ],
)
def test_bad_arguments_are_named_when_the_callback_is_made(arguments: dict, sentence: str) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        ActivationOffload(**arguments)


def test_a_folder_that_cannot_be_written_is_refused_when_the_callback_is_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(MisconfigurationException, match=r"directory='.*' cannot be written"):
        ActivationOffload("disk", directory=tmp_path)
