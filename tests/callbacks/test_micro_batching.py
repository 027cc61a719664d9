"""Micro-batching: the update, the logs and the outputs of the whole batch."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memopt import ChunkedLoss, GradientAccumulation, MicroBatching, predict_memory
from tests.callbacks.test_accumulation import TokenModel, by_hand, loader, token_batches
from tests.parity import assert_parity, assert_same_training, train
from tests.zoo import ZOO, slow_where

AUTOMATIC = [name for name, entry in ZOO.items() if entry.automatic]
WITHOUT_BATCH_NORM = [name for name in AUTOMATIC if not ZOO[name].has_batch_norm]
# In double precision: in single, Adam blows rounding up where a gradient is 0 (the bias of attention keys).
DOUBLE = {"precision": "64-true"}


@pytest.mark.parametrize("name", slow_where(WITHOUT_BATCH_NORM))
def test_uneven_micro_batches_train_as_the_whole_batch(name):
    run = assert_parity(ZOO[name], [MicroBatching(3)], **DOUBLE)
    assert run.trainer.global_step == 20


class Padded(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def training_step(self, batch, batch_idx):
        x, labels = batch
        return F.cross_entropy(self.layer(x).flatten(0, 1), labels.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_mean_over_padded_labels_that_samples_do_not_weigh_is_warned_of_once_and_tokens_are_not(chunked):
    lengths = torch.tensor([3, 3, 5, 1])
    labels = torch.ones(4, 5).long().where(torch.arange(5) < lengths[:, None], -100)
    batches = DataLoader([(torch.randn(5, 4), each) for each in (*labels, *labels)], batch_size=4)

    def warnings_of(**options):
        with pytest.warns() as warned:
            callbacks = [MicroBatching(2, **options), *([ChunkedLoss(head="layer")] if chunked else [])]
            train(Padded(), batches, steps=4, callbacks=callbacks)
        return [str(each.message) for each in warned if "MicroBatching" in str(each.message)]

    assert warnings_of() == []  # 6 targets in each half
    labels[3, 1] = 2
    batches = DataLoader([(torch.randn(5, 4), each) for each in (*labels, *labels)], batch_size=4)
    (said,) = warnings_of()
    assert "the loss of `Padded` is a mean" in said and "they hold 6, 7 of these" in said
    assert warnings_of(normalize="tokens", count=lambda batch: (batch[1] != -100).sum()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict_memory(Padded(), next(iter(batches)), callbacks=[MicroBatching(2)])


def test_a_loss_that_compares_the_samples_of_a_batch_is_warned_of():
    class Contrastive(Padded):
        def training_step(self, batch, batch_idx):
            (x,) = batch
            return F.cross_entropy(self.layer(x) @ self.layer(x).T, torch.arange(len(x)))

    batches = DataLoader([(torch.randn(4),) for _ in range(8)], batch_size=4)
    with pytest.warns(
        UserWarning, match="loss of `Contrastive`, which compares the samples of a batch with each other"
    ):
        train(Contrastive(), batches, steps=2, callbacks=[MicroBatching(2)])


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 100])
def test_any_size_trains_as_the_whole_batch(size):
    assert_parity(ZOO["metrics_mlp"], [MicroBatching(size)], **DOUBLE)


@pytest.mark.parametrize("name", AUTOMATIC)
def test_auto_with_enough_memory_is_plain_training_bit_for_bit(name):
    callback = MicroBatching()
    options = {"steps": 4, "gradient_clip_val": 0.5}
    entry = ZOO[name]
    plain = train(entry.build(dropout=0.1), entry.loader(), **options)
    auto = train(entry.build(dropout=0.1), entry.loader(), callbacks=[callback], **options)
    assert_same_training(plain, auto, rtol=0, atol=0)
    assert callback.size is None


def test_it_works_under_lightnings_own_accumulation():
    options = DOUBLE | {"accumulate_grad_batches": 3, "steps": 6, "gradient_clip_val": 0.5}
    entry = ZOO["encoder"]
    plain = train(entry.build(), entry.loader(), **options)
    micro = train(entry.build(), entry.loader(), callbacks=[MicroBatching(3)], **options)
    assert_same_training(plain, micro)


@pytest.mark.parametrize("micro_first", [True, False])
def test_token_weights_of_both_accumulation_and_micro_batches_give_the_large_batch(micro_first):
    batches = token_batches()
    expected, gradients = by_hand(batches, [[4, 4, 4, 1]], clip=0.05)
    module = TokenModel()
    tokens = {"normalize": "tokens", "mask_key": "labels"}
    callbacks = [GradientAccumulation(4, **tokens), MicroBatching(1, **tokens)]
    if micro_first:
        callbacks.reverse()
    train(module, loader(batches), steps=-1, max_epochs=1, callbacks=callbacks, gradient_clip_val=0.05)
    torch.testing.assert_close(torch.stack(module.gradients), torch.stack(gradients), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-7)


def test_the_loss_scale_of_fp16_passes_through():
    def run(callbacks):
        plugin = pl.plugins.MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", 1024.0))
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        entry = ZOO["mlp"]
        return train(entry.build(), entry.loader(), callbacks=callbacks, plugins=[plugin], gradient_clip_val=0.1)

    assert_same_training(run([]), run([MicroBatching(3)]))


def test_manual_optimization_is_refused_by_name():
    entry = ZOO["gan"]
    with pytest.raises(MisconfigurationException, match="`GAN` optimizes manually"):
        train(entry.build(), entry.loader(), steps=1, callbacks=[MicroBatching(2)])


def test_a_backward_of_the_users_own_gets_a_warning_that_it_is_called_for_each_micro_batch():
    class Penalizes(type(ZOO["mlp"].build())):
        def backward(self, loss):
            loss.backward()
            sum(weight.square().sum() for weight in self.parameters()).backward()

    with pytest.warns(UserWarning, match=r"`Penalizes\.backward` once for each micro-batch"):
        train(Penalizes(0.0), ZOO["mlp"].loader(), steps=1, callbacks=[MicroBatching(4)])


class _Teaches(type(ZOO["mlp"].build())):
    """The teacher follows what is trained, as in MoCo and BYOL."""

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def follow(self):
        with torch.no_grad():
            for mine, trained in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.data.lerp_(trained, 0.1)  # leaves no trace but values


class _TeachesInTheStep(_Teaches):
    def training_step(self, batch, batch_idx):
        self.follow()
        return super().training_step(batch, batch_idx)


class _TeachesOnceABatch(_Teaches):
    def on_train_batch_start(self, batch, batch_idx):
        self.follow()


def test_a_step_that_writes_to_a_teacher_is_warned_of_and_hooks_that_are_called_once_a_batch_are_not():
    # A teacher that starts as its student moves by rounding alone, and by chance a sum stays.
    with pytest.warns(UserWarning, match=r"`training_step` writes to `teacher\.\S+` and \d more itself") as warned:
        train(_TeachesInTheStep(0.0), ZOO["mlp"].loader(), steps=4, callbacks=[MicroBatching(4)])
    assert sum("writes to" in str(warning.message) for warning in warned) == 1
    for module, size in ((_TeachesOnceABatch, 4), (_TeachesInTheStep, "auto")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(module(0.0), ZOO["mlp"].loader(), steps=4, callbacks=[MicroBatching(size)])
        assert not any("writes to" in str(warning.message) for warning in caught)


def test_a_block_that_writes_a_buffer_of_its_own_is_warned_of():
    class Quantizes(type(ZOO["mlp"].build())):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("counts", torch.zeros(3))
            self.register_buffer("angles", torch.full((2,), float("nan"), dtype=torch.complex64))

        def training_step(self, batch, batch_idx):
            self.counts += 1
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"`training_step` writes to `counts` itself"):
        train(Quantizes(0.0), ZOO["mlp"].loader(), steps=1, callbacks=[MicroBatching(4)])


def test_batch_norm_gets_one_warning_that_says_what_changes():
    entry = ZOO["cnn"]
    with pytest.warns(UserWarning, match=r"`blocks\.0\.norm1` and 5 more .* over the micro-batch") as warned:
        train(entry.build(), entry.loader(), steps=2, callbacks=[MicroBatching(4)])
    assert sum("MicroBatching" in str(warning.message) for warning in warned) == 1


class Logs(pl.LightningModule):
    """Logs in each way there is."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Linear(16, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("sized", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("correct", (self.net(x).argmax(1) == y).sum().float(), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("largest", x.max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("smallest", x.min(), on_step=True, on_epoch=True, reduce_fx=torch.min)
        self.log("lr", 0.1)
        return {"loss": loss, "logits": self.net(x), "norm": x.square().mean(), "name": "x", "pair": (x, y)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class _Record(Callback):
    def __init__(self):
        self.step_metrics, self.outputs = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.outputs.append(outputs)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step_metrics.append(dict(trainer.logged_metrics))


def logged(callbacks, module=None):
    record = _Record()
    samples = ZOO["mlp"].loader(batches=3).dataset
    loader = DataLoader(samples, batch_sampler=[range(8), range(8, 15), range(15, 24)])
    run = train(module or Logs(), loader, steps=-1, max_epochs=1, callbacks=[*callbacks, record])
    return record, run.trainer


def test_logged_values_are_those_of_the_whole_batch_on_step_and_on_epoch():
    plain, plain_trainer = logged([])
    micro, micro_trainer = logged([MicroBatching(3)])
    torch.testing.assert_close(micro.step_metrics, plain.step_metrics)
    torch.testing.assert_close(micro_trainer.logged_metrics, plain_trainer.logged_metrics)
    torch.testing.assert_close(micro_trainer.callback_metrics, plain_trainer.callback_metrics)
    torch.testing.assert_close(micro_trainer.progress_bar_metrics, plain_trainer.progress_bar_metrics)
    assert {"loss_step", "loss_epoch", "correct_epoch", "largest_step", "lr"} <= plain_trainer.logged_metrics.keys()


def test_a_logger_gets_one_row_a_step(tmp_path):
    entry = ZOO["shared_block"]
    options = {"steps": 4, "log_every_n_steps": 1}
    train(entry.build(), entry.loader(), logger=CSVLogger(tmp_path / "plain"), **options)
    callbacks = [MicroBatching(3)]
    train(entry.build(), entry.loader(), logger=CSVLogger(tmp_path / "micro"), callbacks=callbacks, **options)
    plain, micro = (next((tmp_path / name).rglob("metrics.csv")).read_text() for name in ("plain", "micro"))
    assert len(micro.splitlines()) == len(plain.splitlines()) == 1 + 4 + 1  # head, steps, epoch


def test_a_metric_object_sees_each_sample_once():
    entry = ZOO["metrics_mlp"]
    plain, plain_trainer = logged([], entry.build())
    micro, micro_trainer = logged([MicroBatching(3)], entry.build())
    torch.testing.assert_close(micro.step_metrics, plain.step_metrics)
    torch.testing.assert_close(micro_trainer.logged_metrics, plain_trainer.logged_metrics)


def test_outputs_are_put_together_for_the_batch():
    plain, _ = logged([])
    micro, _ = logged([MicroBatching(3)])
    for ours, theirs in zip(micro.outputs, plain.outputs, strict=True):
        assert ours.pop("name") == ["x"] * -(-len(ours["logits"]) // 3)
        theirs.pop("name")
        assert not ours["logits"].requires_grad
        torch.testing.assert_close(ours, theirs)


def test_each_hook_is_called_once_a_batch_and_after_backward_sees_the_whole_gradient():
    class Hooks(Callback):
        def __init__(self):
            self.calls, self.gradients = [], []

        def on_before_zero_grad(self, *_):
            self.calls.append("zero")

        def on_before_backward(self, *_):
            self.calls.append("before")

        def on_after_backward(self, trainer, module):
            self.calls.append("after")
            self.gradients.append(module.net[0].weight.grad.clone())

        def on_before_optimizer_step(self, *_):
            self.calls.append("step")

    entry = ZOO["mlp"]
    plain, micro = Hooks(), Hooks()
    train(entry.build(), entry.loader(), steps=3, callbacks=[plain])
    train(entry.build(), entry.loader(), steps=3, callbacks=[MicroBatching(3), micro])
    assert sorted(micro.calls) == sorted(plain.calls)
    torch.testing.assert_close(micro.gradients, plain.gradients)


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left_patched_after_fit_also_when_training_raises(raises):
    class Raising(Logs):
        def training_step(self, batch, batch_idx):
            if raises and batch_idx == 1 and len(batch[0]) < 3:
                raise KeyError("no")
            return super().training_step(batch, batch_idx)

    module, callback = Raising(), MicroBatching(3)
    seen = {}

    class See(Callback):
        def on_fit_start(self, trainer, module):
            optimization = trainer.fit_loop.epoch_loop.automatic_optimization
            seen.update(optimization=optimization, keys=vars(optimization).keys() | set(), trainer=trainer)

    see = See()
    try:
        train(module, ZOO["mlp"].loader(), steps=3, callbacks=[see, callback])
    except KeyError:
        assert raises
    assert vars(seen["optimization"]).keys() == seen["keys"]
    assert not {"on_after_backward", "on_before_backward"} & (vars(module).keys() | vars(see).keys())
    assert "log" not in vars(seen["trainer"].fit_loop.epoch_loop._results)


def test_a_skipped_micro_batch_adds_nothing_and_a_skipped_batch_stays_skipped():
    class Skipping(Logs):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    record, trainer = logged([MicroBatching(3)], Skipping())
    assert record.outputs[1] == {}
    assert trainer.global_step == 3


def test_images_of_several_sizes_and_their_targets_are_split_by_samples():
    class Detector(pl.LightningModule):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                self.net = torch.nn.Conv2d(3, 4, 3)

        def training_step(self, batch, batch_idx):
            images, targets = batch
            found = torch.stack([self.net(image).mean(dim=(1, 2)) for image in images])
            return torch.nn.functional.mse_loss(found, torch.cat([target["boxes"] for target in targets]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    samples = [(torch.randn(3, 8, 8 + index % 5), {"boxes": torch.randn(1, 4)}) for index in range(14)]

    def run(*callbacks):
        batches = DataLoader(samples, batch_size=7, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
        return train(Detector(), batches, steps=2, callbacks=callbacks)

    assert_same_training(run(), run(MicroBatching(3)))


def test_a_split_of_the_users_own_serves_batches_that_cannot_be_cut():
    class Ragged(TokenModel):
        def training_step(self, batch, batch_idx):
            return torch.cat([self.net(x) for x in batch]).square().mean()

    batches = [[torch.randn(n, 4) for n in (3, 5, 2)] for _ in range(4)]
    plain = train(Ragged(), loader(batches), steps=4)
    callback = MicroBatching(
        2,
        split=lambda batch, size: [batch[i : i + size] for i in range(0, len(batch), size)],
        normalize="tokens",
        count=lambda batch: sum(len(x) for x in batch),
    )
    assert_same_training(plain, train(Ragged(), loader(batches), steps=4, callbacks=[callback]))
    with pytest.raises(MisconfigurationException, match=r"disagree on the number of samples \(batch\[0\]: 3"):
        train(Ragged(), loader(batches), steps=4, callbacks=[MicroBatching(2)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 0}, "size=0"),
        ({"size": True}, "size=True"),
        ({"size": "half"}, "size='half'"),
        ({"size": 2, "normalize": "batch"}, "normalize='batch' is unknown"),
        ({"size": 2, "normalize": "tokens"}, "neither was given"),
        ({"size": 2, "count": len}, "normalize='samples'"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_given(arguments, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        MicroBatching(**arguments)


def test_a_step_that_takes_the_iterator_is_refused():
    class Iterator(Logs):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(MisconfigurationException, match="dataloader_iter"):
        train(Iterator(), ZOO["mlp"].loader(), steps=1, callbacks=[MicroBatching(2)])


def test_auto_counts_samples_by_the_users_own_split():
    class Ragged(TokenModel):
        def training_step(self, batch, batch_idx):
            if len(batch) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. (Not really.)")
            return torch.stack([self.net(x).square().mean() for x in batch]).mean()

    batches = [[torch.randn(n, 4) for n in (3, 5, 2, 4)] for _ in range(2)]
    callback = MicroBatching(
        split=lambda batch, size: [batch[i : i + size] for i in range(0, len(batch), size)],
        normalize="tokens",
        count=len,
    )
    train(Ragged(), loader(batches), steps=2, callbacks=[callback])
    assert callback.size == 2


@pytest.mark.slow
def test_prediction_sees_what_micro_batches_save():
    entry = ZOO["encoder"]
    activations, gradients = {}, {}
    for size in (None, "auto", 2):
        callbacks = [] if size is None else [GradientAccumulation(1, normalize="samples"), MicroBatching(size)]
        predicted = predict_memory(entry.build(), entry.batch(), callbacks=callbacks).by_category
        activations[size], gradients[size] = predicted["activations"], predicted["gradients"]
    assert activations["auto"] == pytest.approx(activations[None], rel=0.01)
    assert activations[2] == pytest.approx(activations[None] / 4, rel=0.01)
    assert gradients["auto"] < gradients[None]  # cleared before the forward, where the peak is
