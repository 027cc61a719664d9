"""The recipe for Ray Train of ``docs/multi_node.md``: ``ray_training.py STRATEGY FOLDER [--fail RANK BATCH]``."""

import os

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayLightningEnvironment
from ray.train.torch import TorchTrainer

from tests.strategies.elastic_training import fit, read_arguments

RANKS = 2


def main() -> None:
    arguments = read_arguments()
    fails = None if arguments.fail is None else tuple(arguments.fail)

    def train() -> None:
        environment = RayLightningEnvironment()
        fit(arguments.strategy, arguments.folder, RANKS, fails, arguments.how, plugins=[environment], devices="auto")

    paths = {"PYTHONPATH": os.environ["PYTHONPATH"]}  # of the workers, which import this too
    ray.init(num_cpus=RANKS, include_dashboard=False, runtime_env={"env_vars": paths})
    TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=RANKS, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(arguments.folder), failure_config=FailureConfig(max_failures=1)),
    ).fit()


if __name__ == "__main__":
    main()
