"""Started as users start it: torchrun with restarts, two hosts, SLURM's environment."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.strategies.elastic_training import BATCHES, EPOCHS, STRATEGIES

pytestmark = pytest.mark.slow  # each process imports torch and Lightning

DEADLINE_SECONDS = 150
SCRIPT = ["-m", "tests.strategies.elastic_training"]
ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    cleared = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return cleared | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | variables


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), cwd=ROOT, timeout=DEADLINE_SECONDS, capture_output=True, text=True, check=False
    )


def losses_in(folder: Path) -> np.ndarray:
    """Of each step, as it was last computed."""
    lines = (line.split() for line in (folder / "losses").read_text().splitlines())
    losses = {int(step): float(loss) for step, loss in lines}
    assert sorted(losses) == list(range(1, BATCHES * EPOCHS + 1))
    return np.array([losses[step] for step in sorted(losses)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_restarts_after_a_kill_with_the_losses_of_the_uninterrupted_run(
    strategy: str, killed: int, tmp_path: Path
) -> None:
    usual = ["--nproc-per-node=2", "--standalone", "--max-restarts=1", *SCRIPT, strategy]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = torchrun(*usual, tmp_path / "whole")
    interrupted = torchrun(*usual, tmp_path / "killed", "--kill", killed, BATCHES + 2)

    assert whole.returncode == 0, whole.stderr
    assert interrupted.returncode == 0, interrupted.stderr
    assert f"Rank {killed} " in interrupted.stderr and "forward of batch 2" in interrupted.stderr
    assert len((tmp_path / "killed" / "losses").read_text().splitlines()) > BATCHES * EPOCHS, "nothing was done again"
    np.testing.assert_allclose(losses_in(tmp_path / "killed"), losses_in(tmp_path / "whole"), rtol=1e-5)
