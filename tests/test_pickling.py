"""Callbacks and plugins go to spawned processes and into copies, before training and after it."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch

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
    "low_bit_bitsandbytes": lambda: memopt.LowBitOptimizer(8, engine="bitsandbytes"),
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


class _Copies(pl.Callback):
    """Copies the trainer and all that it holds in the middle of an accumulation window."""

    def __init__(self, pickles: bool) -> None:
        self.pickles = pickles
        self.copied: list[pl.Trainer] = []

    def on_train_batch_end(self, trainer, *_):
        if not self.copied:
            self.copied.append(pickle.loads(pickle.dumps(trainer)) if self.pickles else copy.deepcopy(trainer))


class _OneLayer(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["x"]).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("pickles", [False, True], ids=["copied", "pickled"])
@pytest.mark.parametrize("name", ["accumulation", "micro_batching", "monitor", "optimizer_in_backward", "offload"])
def test_a_trainer_is_copied_and_pickled_while_it_trains(name, pickles, tmp_path):
    copies = _Copies(pickles)
    technique = memopt.GradientAccumulation(2) if name == "accumulation" else TECHNIQUES[name]()
    if name == "micro_batching":
        technique = memopt.MicroBatching(2)
    loader = torch.utils.data.DataLoader([{"x": torch.ones(4)}] * 8, batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[technique, copies],
    )  # fmt: skip
    trainer.fit(_OneLayer(), loader)
    assert trainer.global_step >= 1
    (copied,) = copies.copied
    assert type(copied) is pl.Trainer
