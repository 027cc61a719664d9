"""``lightning-memopt plan`` from the words that a user types to the exit code."""

import json

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_memopt.cli import main
from lightning_memopt.planning.read_module import check_budget
from tests.planning import test_plan
from tests.planning.test_plan import Deep, _batch  # noqa: F401 (found by name)

_WORDS = ["plan", "tests.planning.test_plan:Deep", "--batch-from", "tests.planning.test_plan:_batch", "--gpu", "h100"]


def _run(capsys, *more: str) -> tuple[int, str, str]:
    code = main([*_WORDS, *more])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_budget_with_room_gives_plans_as_json_that_name_what_to_switch_on(capsys):
    code, out, err = _run(capsys, "--init", "blocks=3", "--data-init", "samples=64", "--budget", "1GiB", "--json")
    said = json.loads(out)
    assert (code, err) == (0, "")
    chosen = said["plans"][said["chosen"]]
    assert {"strategy", "callbacks", "peak_bytes", "by_category", "relative_time", "fits"} <= chosen.keys()
    assert chosen["fits"] and chosen["peak_bytes"] == sum(chosen["by_category"].values()) <= 2**30
    # 3 blocks of 2 layers of 32 by 32 and a bias, as --init says; a GPU hands out multiples of 512 bytes
    assert chosen["by_category"]["parameters"] == 3 * 2 * (32 * 32 * 4 + 512)


def test_where_nothing_fits_the_exit_code_is_3_with_the_smallest_budget_and_the_fewest_devices(capsys):
    # cuBLAS's workspace of an H100 alone is 32 MiB, so that no number of devices would do.
    code, out, err = _run(capsys, "--budget", "1MiB")
    assert code == 3 and "too large" in out
    assert err.startswith(
        "lightning-memopt plan: nothing fits 1.0 MiB a device: the smallest budget that would do is"
    )
    assert "devices would do" not in err


def test_a_budget_below_the_parameters_of_one_block_is_refused_in_one_line_that_names_it(capsys):
    code, out, err = _run(capsys, "--budget", "4KB")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "`blocks.0` has 4.1 KiB (4,224 bytes)" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "24G"], "'24GiB' (25,769,803,776 bytes) or '24GB' (24,000,000,000 bytes)"),
        (["--gpu", "h1000"], "did you mean h100"),
        (["--init", "depth=3"], "got an unexpected keyword argument 'depth'); it takes blocks, width"),
        (["--data-init", "rows=3"], "got an unexpected keyword argument 'rows'); it takes samples, width"),
        (["--trainer", "precision=16-true"], "--trainer precision=16-true is what a plan says; leave it out"),
        (["--trainer", "gradient_clip=1"], "pl.Trainer cannot be called with these arguments"),
        (["--data-init", "width=16"], f"fails at {test_plan.__file__}:"),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_exit_code_2(capsys, more, message):
    code, out, err = _run(capsys, *more)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and message in err


def test_the_table_ends_with_a_trainer_to_paste(capsys):
    code, out, _ = _run(capsys, "--budget", "1GiB", "--data-init", "samples=64")
    assert code == 0
    assert "trainer = pl.Trainer(" in out and "\ntrainer:\n  accelerator: gpu" in out


@pytest.mark.slow
def test_a_narrow_table_cuts_no_name_short(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = _run(capsys, "--budget", "33MiB", "--data-init", "samples=4096")
    assert "…" not in out


def test_what_is_no_class_and_no_function_is_refused_in_one_line(capsys):
    code = main([*_WORDS[:1], "tests.planning.test_plan:TIGHT", *_WORDS[2:]])
    assert code == 2 and "TIGHT is a int, which makes nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_where_nothing_fits_on_several_nodes_the_fewest_devices_are_those_of_all_nodes_together(capsys):
    words = ["--init", "width=1024", "--data-init", "width=1024", "--data-init", "samples=8"]
    # A workspace of 32 MiB, and 64 MiB of parameters, gradients and Adam's state that are shared.
    code, _, err = _run(capsys, *words, "--budget", "48MiB", "--devices", "2", "--nodes", "2")
    assert code == 3 and "such devices would do" in err
    assert int(err.rpartition("; ")[2].split()[0]) == 8
    assert _run(capsys, *words, "--budget", "48MiB", "--devices", "2", "--nodes", "4")[0] == 0


def test_a_budget_below_the_largest_layer_of_a_module_without_blocks_is_refused_by_the_layers_name():
    module = pl.LightningModule()
    module.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))
    check_budget(module, 64 * 65 * 4, ways=1, least_itemsize=4)
    with pytest.raises(ValueError, match=r"`net\.2` has 16\.2 KiB"):
        check_budget(module, 64 * 65 * 4 - 1, ways=1, least_itemsize=4)
