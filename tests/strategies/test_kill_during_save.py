"""A rank is killed while a checkpoint is being written: the one before it is what is found, and it is whole."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memopt import full_state_dict, latest_checkpoint
from lightning_memopt.checkpoints import atomic, write_sharded
from tests.ending import end_of_ranks
from tests.strategies.test_faults import DEADLINE_SECONDS, RANKS, STRATEGIES, Module, fit_module, others_than

NUMBER = 3
"""Of the save in which a rank is killed."""

QUICK = [("memopt_ddp", "full"), ("memopt_zero3", "sharded")]


def killing_in(act: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """``act``, at whose call number ``NUMBER`` in process ``rank`` the process is killed when all is written."""
    calls = 0

    def act_or_die(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = act(*args)
        if calls == NUMBER and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return act_or_die


def before(act: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """As :func:`killing_in`, before ``act`` does anything."""
    die_or_not = killing_in(lambda *args: None, rank)

    def die_or_act(*args: Any) -> Any:
        die_or_not(*args)
        return act(*args)

    return die_or_act


@pytest.mark.parametrize(
    ("name", "save"),
    [
        pytest.param(name, save, marks=[] if (name, save) in QUICK else [pytest.mark.slow])
        for name in STRATEGIES
        for save in ("full", "sharded", "async")
    ],
)
def test_the_checkpoint_before_is_found_where_a_rank_is_killed_with_the_bytes_written(
    name: str, save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if save == "full":
        killed = 0
        monkeypatch.setattr(atomic, "commit", before(atomic.commit, killed))
    else:
        killed = 1
        monkeypatch.setattr(write_sharded._Writer, "write_data", killing_in(write_sharded._Writer.write_data, killed))

    def fit() -> None:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit_module(STRATEGIES[name](save=save), Module(None), callbacks=[saves])

    endings = end_of_ranks(fit, RANKS[name], DEADLINE_SECONDS)

    assert endings[killed].code == -signal.SIGKILL, endings[killed]
    for other in others_than(killed, endings):
        assert other.failed_with(f"Rank {killed} ", "its process ended without a word"), other
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and Path(newest).name == f"step={NUMBER - 1}.ckpt"
    assert full_state_dict(newest).keys() == Module(None).state_dict().keys()
    shown = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert shown == {f"step={number}.ckpt" for number in range(1, NUMBER)}
