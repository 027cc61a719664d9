"""Files and directories that are whole or not there."""

import errno
import os
import shutil

import pytest
import torch

from lightning_memopt import AtomicCheckpointIO, latest_checkpoint
from lightning_memopt.checkpoints.atomic import MANIFEST, bytes_of, is_whole, replacing, save_file
from tests.checkpoints.disk import small_disk

CHECKPOINT = {"state_dict": {"weight": torch.arange(50_000.0)}, "epoch": 3}


def _save_directory(path, text="values"):
    with replacing(path, 0) as temporary:
        temporary.mkdir()
        (temporary / "shard").write_text(text)


def test_a_file_is_what_torch_loads_and_nothing_else_is_left(tmp_path):
    save_file(CHECKPOINT, tmp_path / "new" / "last.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "last.ckpt", weights_only=True)
    assert torch.equal(loaded["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])
    assert os.listdir(tmp_path / "new") == ["last.ckpt"]


def test_a_save_that_fails_leaves_the_older_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(CHECKPOINT, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"pickle|local object"):  # as Python 3.13 says it
        save_file({**CHECKPOINT, "epoch": lambda: None}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("is_link", [False, True])
def test_a_directory_takes_the_place_of_an_older_one_or_of_a_link(tmp_path, is_link):
    path = tmp_path / "last.ckpt"
    _save_directory(tmp_path / "other.ckpt", "other")
    if is_link:
        path.symlink_to("other.ckpt")
    else:
        _save_directory(path, "old")
    _save_directory(path, "new")
    assert (path / "shard").read_text() == "new"
    assert (tmp_path / "other.ckpt" / "shard").read_text() == "other"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "other.ckpt"]


def test_the_latest_checkpoint_is_never_a_half_written_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    save_file(CHECKPOINT, tmp_path / "a.ckpt")
    _save_directory(tmp_path / "b.ckpt")
    names = ("short.ckpt", "no-manifest.ckpt", "short-shard.ckpt", ".killed.ckpt.saving")
    (tmp_path / names[0]).write_bytes((tmp_path / "a.ckpt").read_bytes()[:-100])
    for name in names[1:]:
        shutil.copytree(tmp_path / "b.ckpt", tmp_path / name)
    (tmp_path / names[1] / MANIFEST).unlink()
    (tmp_path / names[2] / "shard").write_text("val")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "b.ckpt")
    shutil.rmtree(tmp_path / "b.ckpt")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "a.ckpt")


def test_a_directory_that_was_being_replaced_when_the_run_was_killed_is_still_found(tmp_path):
    _save_directory(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.previous")
    found = latest_checkpoint(tmp_path)
    assert found == str(tmp_path / ".last.ckpt.previous")
    assert is_whole(found)


def test_a_full_disk_says_what_is_needed_and_free_and_leaves_the_older_checkpoint(tmp_path):
    with small_disk(tmp_path / "disk", 300_000) as folder:
        path = folder / "last.ckpt"
        save_file(CHECKPOINT, path)
        free = shutil.disk_usage(folder).free
        with pytest.raises(OSError, match="disk is full") as caught:
            save_file(CHECKPOINT, path)
        assert caught.value.errno == errno.ENOSPC
        for part in (str(path), "200,000 bytes", f"{free:,} are free"):
            assert part in str(caught.value)
        assert os.listdir(folder) == ["last.ckpt"]
        assert torch.load(path, weights_only=True)["epoch"] == 3


def test_tied_tensors_count_once():
    weight = torch.zeros(10)
    assert bytes_of({"a": weight, "b": [weight[:5], torch.zeros(1)], "c": 3}) == 44
