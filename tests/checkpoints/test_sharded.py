"""Sharded checkpoints, read and made one file of without the ranks that wrote them."""

import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_memopt import full_state_dict
from lightning_memopt.checkpoints.atomic import MANIFEST, is_whole
from lightning_memopt.checkpoints.consolidate import consolidate, consolidate_to_safetensors
from lightning_memopt.checkpoints.sharded import ShardedCheckpoint
from lightning_memopt.checkpoints.write_sharded import save_sharded, split_checkpoint
from lightning_memopt.cli import main
from tests.distributed import run_on_ranks

MIB = 2**20
_LARGEST, _COUNT, _SLACK = 8 * MIB, 16, 40 * MIB


def _consolidate_capped(*arguments: str) -> int:
    """Run the command with room for one tensor. What maps the file itself is not private data, and not counted."""
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + _LARGEST + _SLACK, resource.RLIM_INFINITY))
    return main(["consolidate", *arguments])


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def saved(tmp_path):
    """A checkpoint as one device would save it, and the directory where it lies in parts."""
    module = _Tied()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module.head(module.norm(module.embed(torch.arange(5)))).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 2,
        "callbacks": {"own": {"best": torch.tensor(0.5)}},
        "state_dict": module.state_dict(keep_vars=True),
        "optimizer_states": [optimizer.state_dict()],
    }
    save_sharded(*split_checkpoint(checkpoint, module, [optimizer]), tmp_path / "sharded.ckpt")
    return checkpoint, tmp_path / "sharded.ckpt"


def _assert_same(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)
    assert list(actual) == list(expected)


def test_the_weights_are_read_under_the_users_names_and_still_tied(saved):
    checkpoint, path = saved
    weights = full_state_dict(path)
    _assert_same(weights, {name: value.detach() for name, value in checkpoint["state_dict"].items()})
    assert weights["head.weight"] is weights["embed.weight"]


def test_a_file_is_read_by_the_same_names(saved, tmp_path):
    checkpoint, _ = saved
    weights = {name: value.detach() for name, value in checkpoint["state_dict"].items()}
    torch.save({"state_dict": weights}, tmp_path / "plain.ckpt")
    _assert_same(full_state_dict(tmp_path / "plain.ckpt"), weights)


def test_one_file_of_it_is_what_one_device_would_have_saved(saved, tmp_path):
    checkpoint, path = saved
    out = tmp_path / "out.ckpt"
    assert main(["consolidate", str(path), str(out)]) == 0
    made = torch.load(out, weights_only=True)
    assert made["epoch"] == 2
    assert made["callbacks"] == checkpoint["callbacks"]
    _assert_same(made["state_dict"], {name: value.detach() for name, value in checkpoint["state_dict"].items()})
    assert made["state_dict"]["head.weight"].data_ptr() == made["state_dict"]["embed.weight"].data_ptr()
    (state,), (expected,) = made["optimizer_states"], checkpoint["optimizer_states"]
    assert state["param_groups"] == expected["param_groups"]
    for index, entry in expected["state"].items():
        _assert_same(state["state"][index], entry)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_safetensors_file_is_read_by_the_library(saved, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    _, path = saved
    consolidate_to_safetensors(path, tmp_path / "out.safetensors")
    weights = full_state_dict(path)
    del weights["head.weight"]  # tied to another
    read = library.load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close({name: read[name] for name in weights}, weights, rtol=0, atol=0)
    assert set(read) == set(weights)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [(), ("--safetensors",)])
def test_making_one_file_takes_no_more_memory_than_the_largest_tensor(tmp_path, kind):
    module = nn.ParameterList([torch.full((_LARGEST // 4,), float(i)) for i in range(_COUNT)])
    tensors, rest = split_checkpoint({"state_dict": module.state_dict()}, module, [])
    save_sharded(tensors, rest, tmp_path / "sharded.ckpt")
    assert _COUNT * _LARGEST > 2 * (_LARGEST + _SLACK)
    out = tmp_path / "out"
    assert run_on_ranks(_consolidate_capped, 1, str(tmp_path / "sharded.ckpt"), str(out), *kind) == [0]
    if not kind:
        last = torch.load(out, weights_only=True, mmap=True)["state_dict"][str(_COUNT - 1)]
        assert bool((last == _COUNT - 1).all())


@pytest.mark.parametrize("damage", ["shard", "manifest"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_refused(saved, damage):
    _, path = saved
    if damage == "manifest":
        (path / MANIFEST).unlink()
    else:
        shard = next(path.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])
    assert not is_whole(path)
    with pytest.raises(ValueError, match="not written to its end"):
        full_state_dict(path)


def test_an_index_that_would_run_code_is_refused(saved):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    _, path = saved
    before = (path / ".metadata").stat().st_size
    code = pickle.dumps(Evil())
    (path / ".metadata").write_bytes(code + b"\0" * (before - len(code)))
    with pytest.raises(ValueError, match=r"names posix.system"):
        ShardedCheckpoint(path)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="no whole checkpoint file"):
        full_state_dict(tmp_path / "text.ckpt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="no `state_dict`"):
        full_state_dict(tmp_path / "weights.ckpt")
    assert main(["consolidate", str(tmp_path), str(tmp_path / "out.ckpt")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no checkpoint"):
        consolidate(tmp_path, tmp_path / "out.ckpt")
