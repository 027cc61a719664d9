"""Callbacks and plugins go to spawned processes and into copies, before training and after it."""

import copy
import pickle

import pytest

import lightning_memopt as memopt
from tests.parity import train
from tests.zoo import ZOO

TECHNIQUES = {
    "accumulation": lambda: memopt.GradientAccumulation(2, normalize="tokens", mask_key="labels"),
    "micro_batching": lambda: memopt.MicroBatching(3, normalize="tokens", mask_key="labels"),
    "micro_batching_auto": lambda: memopt.MicroBatching("auto"),
    "checkpointing": lambda: memopt.ActivationCheckpointing("budget", budget=0.5, modules="*.h.*"),
    "offload": lambda: memopt.ActivationOffload("disk", min_bytes=1024),
    "optimizer_in_backward": lambda: memopt.OptimizerInBackward(),
    "low_bit_optimizer": lambda: memopt.LowBitOptimizer(8),
    "chunked_loss": lambda: memopt.ChunkedLoss(),
    "gradual_pruning": lambda: memopt.GradualPruning(memopt.ConstantSparsity(0.5)),
    "prune_on_fit_end": lambda: memopt.PruneOnFitEnd(0.5),
    "cluster_weights": lambda: memopt.ClusterWeights(16, begin_step=1),
    "monitor": lambda: memopt.MemoryMonitor(),
    "mixed": lambda: memopt.MixedPrecision("fp16"),
    "half": lambda: memopt.HalfPrecision("bf16"),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_is_pickled_and_copied_before_training_and_after_it_and_the_copy_trains(name, tmp_path):
    technique = pickle.loads(pickle.dumps(TECHNIQUES[name]()))
    key = "plugins" if name in ("mixed", "half") else "callbacks"
    entry = ZOO["gpt2"]
    for made in (technique, copy.deepcopy(technique)):
        run = train(entry.build(), entry.loader(batches=2), steps=2, default_root_dir=tmp_path, **{key: [made]})
        assert run.trainer.global_step in (1, 2)
        pickle.loads(pickle.dumps(made))
        copy.deepcopy(run.module)
