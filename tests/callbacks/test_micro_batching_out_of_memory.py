"""Running out of memory: the batch is repeated in smaller parts, as if it had been so from the start."""

import json
import os
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torchmetrics import Accuracy

from lightning_memopt import GradientAccumulation, MicroBatching
from lightning_memopt.models.out_of_memory import is_out_of_memory
from tests.parity import assert_same_training, train
from tests.zoo import ZOO, slow_where
from tests.zoo.plain import MLP


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (Not really.)")


class Fragile(MLP):
    """Has all that an attempt changes: dropout, BatchNorm, a metric, logs; fails above ``fits`` samples."""

    def __init__(self, where, fits, from_batch=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(dropout=0.2)
            self.norm = nn.BatchNorm1d(16)
        self.accuracy = Accuracy("multiclass", num_classes=4)
        self.where, self.fits, self.from_batch = where, fits, from_batch
        self.tries = []
        self.activations = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.tries.append(len(x))
        assert all(ref() is None for ref in self.activations), "the activations of a failed attempt are still there"
        fails = len(x) > self.fits and batch_idx >= self.from_batch
        hidden = self.net[:3](self.norm(x))
        self.activations.append(weakref.ref(hidden))
        if fails and self.where == "backward":
            hidden = _FailsInBackward.apply(hidden)  # the last layers have their gradients by then
        logits = self.net[3:](hidden)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        if fails and self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. (Not really.)")
        return loss


class _SetSize(Callback):
    """What "auto" arrives at, from batch ``at`` on, without a failure."""

    def __init__(self, micro, at, size):
        self.micro, self.at, self.size = micro, at, size

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.at:
            self.micro._size = self.size


EVERY = list(product([0, 4], [1, 3], ["forward", "backward"]))  # 4 of windows of 3: with gradients pending
QUICK = [(0, 1, "forward"), (0, 3, "backward"), (4, 3, "backward")]


@pytest.mark.parametrize(
    ("from_batch", "accumulate", "where"), slow_where(EVERY, [one for one in EVERY if one not in QUICK])
)
def test_the_update_is_that_of_a_run_that_never_failed(where, accumulate, from_batch):
    failing, micro = Fragile(where, fits=2, from_batch=from_batch), MicroBatching()
    known, whole = Fragile(where, fits=100), MicroBatching()
    options = {"steps": 12 // accumulate, "gradient_clip_val": 0.3}
    loader = ZOO["mlp"].loader(batches=12)
    auto = train(failing, loader, callbacks=[GradientAccumulation(accumulate), micro], **options)
    set_size = _SetSize(whole, from_batch, 2)
    expected = train(known, loader, callbacks=[GradientAccumulation(accumulate), whole, set_size], **options)
    assert_same_training(expected, auto, rtol=0, atol=0)
    torch.testing.assert_close(auto.trainer.logged_metrics, expected.trainer.logged_metrics, rtol=0, atol=0)
    assert micro.size == 2
    assert failing.tries[from_batch : from_batch + 6] == [8, 4, 2, 2, 2, 2]
    assert failing.tries[from_batch + 6 :] == [2] * (len(failing.tries) - from_batch - 6)


def test_pending_gradients_of_lightnings_own_accumulation_survive_a_failure_too():
    loader = ZOO["mlp"].loader(batches=6)
    options = {"steps": 2, "accumulate_grad_batches": 3}
    auto = train(Fragile("backward", 4, from_batch=1), loader, callbacks=[MicroBatching()], **options)
    micro = MicroBatching()
    expected = train(Fragile("backward", 100), loader, callbacks=[micro, _SetSize(micro, 1, 4)], **options)
    assert_same_training(expected, auto, rtol=0, atol=0)


def test_an_odd_batch_is_halved_upwards():
    module = Fragile("forward", fits=3)
    train(module, ZOO["mlp"].loader(batches=2, batch_size=5), steps=1, callbacks=[MicroBatching()])
    assert module.tries == [5, 3, 2]


def test_when_a_single_sample_does_not_fit_the_error_goes_on_with_what_else_would_help():
    class NeverFits(MLP):
        def training_step(self, batch, batch_idx):
            raise torch.OutOfMemoryError("CUDA out of memory. (Not really.)")

    with pytest.raises(torch.OutOfMemoryError, match=r"single sample.*ActivationCheckpointing") as caught:
        train(NeverFits(0.0), ZOO["mlp"].loader(), callbacks=[MicroBatching()])
    assert "Not really" in str(caught.value.__cause__)
    assert is_out_of_memory(caught.value)


def test_a_batch_whose_step_has_written_to_a_parameter_is_not_repeated():
    class WritesToo(Fragile):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.norm.weight.mul_(0.9)
            return super().training_step(batch, batch_idx)

    with pytest.raises(
        MisconfigurationException, match=r"memory ran out: `training_step` .* writes to `norm\.weight`"
    ):
        train(WritesToo("forward", fits=2), ZOO["mlp"].loader(), steps=2, callbacks=[MicroBatching()])


def test_a_fixed_size_does_not_catch_the_error():
    with pytest.raises(torch.OutOfMemoryError, match="Not really"):
        train(Fragile("forward", fits=2), ZOO["mlp"].loader(), callbacks=[MicroBatching(4)])


def test_another_error_goes_through_as_it_is():
    class Broken(MLP):
        def training_step(self, batch, batch_idx):
            raise ValueError("no such luck")

    with pytest.raises(ValueError, match=r"^no such luck$"):
        train(Broken(0.0), ZOO["mlp"].loader(), callbacks=[MicroBatching()])


def test_the_size_arrived_at_is_in_the_checkpoint(tmp_path):
    first = MicroBatching()
    run = train(Fragile("forward", fits=2), ZOO["mlp"].loader(), steps=2, callbacks=[first])
    run.trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = MicroBatching()
    again.load_state_dict(torch.load(tmp_path / "two.ckpt", weights_only=False)["callbacks"][again.state_key])
    assert again.size == first.size == 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which Linux can")
def test_the_cpu_allocators_own_failure_halves_the_batch_and_changes_no_number():
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.rlimit_run"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert "can't allocate memory" in result["whole batch, limited"]
    assert result["auto, limited"]["size"] in (2, 4, 8)
    assert result["auto, limited"] == result["unlimited"]
