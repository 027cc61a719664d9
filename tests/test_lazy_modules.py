"""Modules whose parameters get their shapes in the first forward: trained, or refused by the parameter's name."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from tests.parity import assert_same_training, train


class Lazy(pl.LightningModule):
    def __init__(self, example=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1))
            if example is not None:
                self.net(example)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


BATCHES = DataLoader(torch.linspace(-1, 1, 36).reshape(12, 3), batch_size=4)

REFUSING = {
    "micro_batching": {"callbacks": [memopt.MicroBatching("auto")]},
    "checkpointing": {"callbacks": [memopt.ActivationCheckpointing("full")]},
    "offload": {"callbacks": [memopt.ActivationOffload("disk", min_bytes=1)]},
    "optimizer_in_backward": {"callbacks": [memopt.OptimizerInBackward()]},
    "half": {"plugins": [memopt.HalfPrecision("bf16", rounding="kahan")]},
}


@pytest.mark.parametrize("options", REFUSING.values(), ids=REFUSING)
def test_what_needs_shapes_before_the_first_forward_names_the_parameter_and_works_after_it(options):
    sentence = r"`net\.2\.weight` has no shape before the first forward.*LazyLinear.*run a batch through it first"
    with pytest.raises(MisconfigurationException, match=sentence):
        train(Lazy(), BATCHES, steps=2, **options)
    train(Lazy(torch.ones(1, 3)), BATCHES, steps=2, **options)


@pytest.mark.parametrize(
    ("callback", "options"),
    [(memopt.GradientAccumulation(2), {"accumulate_grad_batches": 2}), (memopt.MicroBatching(2), {})],
    ids=["accumulation", "micro_batching"],
)
def test_what_needs_no_shapes_trains_lazy_modules(callback, options):
    plain = train(Lazy(), BATCHES, steps=1, **options)
    assert_same_training(plain, train(Lazy(), BATCHES, steps=1, callbacks=[callback]), compare_losses=False)


def test_the_monitor_begins_with_the_second_step_of_a_lazy_module(tmp_path):
    monitor = memopt.MemoryMonitor(dirpath=tmp_path)
    train(Lazy(), BATCHES, steps=3, callbacks=[monitor])
    assert [sample.step for sample in monitor.history] == [1, 2]


@pytest.mark.parametrize("find", [memopt.predict_memory, memopt.measure_memory])
def test_the_memory_of_a_module_without_shapes_is_refused_by_name(find):
    with pytest.raises(ValueError, match=rf"{find.__name__}\(\) was given a Lazy: `net\.2\.weight` has no shape"):
        find(Lazy(), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"`net\.2\.weight` has no shape"):
        find(Lazy, torch.ones(4, 3))
    assert find(lambda: Lazy(torch.ones(1, 3)), torch.ones(4, 3)).peak_bytes > 0


def test_tracking_a_module_without_shapes_is_refused_by_name():
    module = Lazy()
    with pytest.raises(ValueError, match=r"`net\.2\.weight` has no shape"), memopt.track_memory(module):
        pass
