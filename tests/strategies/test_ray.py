"""Ranks that Ray Train starts: by Ray itself where it is installed, and by its ways where it is not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment

from tests.distributed import run_on_ranks
from tests.strategies.test_launchers import DEADLINE_SECONDS, ROOT, environment, losses_in
from tests.strategies.users import Net, small_loader, trainer_with


class CountsRanksItself(LightningEnvironment):
    """As ``ray.train.lightning.RayLightningEnvironment``: how many ranks there are it knows, and not the trainer."""

    def world_size(self) -> int:
        return int(os.environ["WORLD_SIZE"])

    def global_rank(self) -> int:
        return int(os.environ["RANK"])

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass

    def teardown(self) -> None:
        pass


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["memopt_zero3", "memopt_pp"])
def test_ranks_of_one_host_share_the_one_processor_that_auto_finds(strategy: str) -> None:
    def fit() -> tuple[int, Any]:
        trainer = trainer_with(strategy, devices="auto", plugins=[CountsRanksItself()])
        trainer.fit(module := Net(), small_loader())
        return trainer.world_size, module.net[0].weight.detach().numpy()

    (size, first), (_, second) = run_on_ranks(fit, 2)
    assert size == 2
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["memopt_zero3", "memopt_pp"])
def test_ray_restarts_after_a_killed_rank_with_the_losses_of_the_uninterrupted_run(
    strategy: str, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason='Ray is not installed: `pip install "ray[train]"`')
    losses = []
    for name, arguments in {"whole": [], "interrupted": ["--fail", "1", "6"]}.items():
        (folder := tmp_path / name).mkdir()
        subprocess.run(
            [sys.executable, "-m", "tests.strategies.ray_training", strategy, str(folder), *arguments],
            env=environment(RAY_USAGE_STATS_ENABLED="0"),
            cwd=ROOT,
            timeout=DEADLINE_SECONDS,
            check=True,
        )
        losses.append(losses_in(folder))
    assert (tmp_path / "interrupted" / "failed").exists()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
