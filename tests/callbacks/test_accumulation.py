"""Gradient accumulation: the gradient of the one large batch, whatever the window."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_memopt import GradientAccumulation
from tests.parity import assert_same_training, quiet_trainer, train
from tests.zoo import ZOO, slow_where

AUTOMATIC = [name for name, entry in ZOO.items() if entry.automatic]
WITHOUT_BATCH_NORM = [name for name in AUTOMATIC if not ZOO[name].has_batch_norm]
LENGTHS = (5, 3, 9, 2, 7, 4, 6, 8, 1, 3, 9, 5, 2)


class TokenModel(pl.LightningModule):
    """The loss is the mean over the tokens that are not ignored; logs each gradient that the optimizer gets."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = torch.nn.Linear(4, 3)
        self.gradients: list[torch.Tensor] = []

    def loss(self, batch):
        return F.cross_entropy(self.net(batch["x"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.gradients.append(self.net.weight.grad.clone())  # what clipping is given
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def token_batches(lengths=LENGTHS):
    """Batches of 2 samples each, padded to 10 tokens, ``lengths`` of which count in the first sample."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in lengths:
        labels = torch.randint(0, 3, (2, 10), generator=generator)
        labels[0, length:] = -100
        labels[1, 2 * length :] = -100
        batches.append({"x": torch.randn(2, 10, 4, generator=generator), "labels": labels})
    return batches


def loader(batches):
    return DataLoader(batches, batch_size=None)


def by_hand(batches, windows, epochs=1, clip=None):
    """The same training written as a plain loop over large batches: ``windows`` lists their lengths, per epoch."""
    module = TokenModel()
    options = module.configure_optimizers()
    optimizer, schedule = options["optimizer"], options["lr_scheduler"]["scheduler"]
    gradients = []
    for epoch in range(epochs):
        start = 0
        for length in windows[epoch]:
            window = batches[start : start + length]
            start += length
            optimizer.zero_grad()
            module.loss({key: torch.cat([batch[key] for batch in window]) for key in window[0]}).backward()
            gradients.append(module.net.weight.grad.clone())
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            schedule.step()
        assert start == len(batches)
    return module, gradients


def fit(module, batches, callback, epochs=1, **options):
    return train(module, loader(batches), steps=-1, max_epochs=epochs, callbacks=[callback], **options)


def assert_same_steps(module, expected, gradients):
    assert len(module.gradients) == len(gradients)
    for ours, theirs in zip(module.gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", slow_where(WITHOUT_BATCH_NORM))
def test_two_batches_of_8_train_as_one_of_16(name):
    entry = ZOO[name]
    # In double precision: in single, Adam blows rounding up where a gradient is 0 (the bias of attention keys).
    options = {"gradient_clip_val": 0.5, "precision": "64-true"}
    one = train(entry.build(), entry.loader(batches=8, batch_size=16), steps=8, **options)
    two = train(entry.build(), entry.loader(batches=16), steps=8, callbacks=[GradientAccumulation(2)], **options)
    assert_same_training(one, two, rtol=1e-7, atol=1e-9, compare_losses=False)
    assert two.trainer.global_step == 8


@pytest.mark.parametrize("name", AUTOMATIC)
def test_full_windows_train_as_with_lightnings_own_accumulation(name):
    entry = ZOO[name]
    options = {"steps": 4, "gradient_clip_val": 0.5}
    plain = train(entry.build(dropout=0.1), entry.loader(batches=12), accumulate_grad_batches=3, **options)
    ours = train(entry.build(dropout=0.1), entry.loader(batches=12), callbacks=[GradientAccumulation(3)], **options)
    assert_same_training(plain, ours, compare_losses=False)
    torch.testing.assert_close(torch.tensor(ours.losses), 3 * torch.tensor(plain.losses))


def test_manual_optimization_is_refused_by_name():
    entry = ZOO["gan"]
    with pytest.raises(MisconfigurationException, match="`GAN` optimizes manually"):
        train(entry.build(), entry.loader(), steps=1, callbacks=[GradientAccumulation(2)])


def test_token_weights_give_the_gradient_of_the_large_batch_also_in_the_short_last_window():
    batches = token_batches()
    expected, gradients = by_hand(batches, [[4, 4, 4, 1]] * 2, epochs=2, clip=0.05)
    module = TokenModel()
    callback = GradientAccumulation(4, normalize="tokens", mask_key="labels")
    run = fit(module, batches, callback, epochs=2, gradient_clip_val=0.05)
    assert_same_steps(module, expected, gradients)
    assert run.trainer.global_step == 8
    assert len(run.losses) == 26


def test_lightnings_own_accumulation_gets_uneven_tokens_wrong_so_that_the_test_above_means_something():
    batches = token_batches()
    _, gradients = by_hand(batches, [[4, 4, 4, 1]])
    module = TokenModel()
    train(module, loader(batches), steps=-1, max_epochs=1, accumulate_grad_batches=4)
    assert not torch.allclose(module.gradients[0], gradients[0], rtol=0.01)


def test_a_count_function_weighs_as_the_labels_do():
    batches = token_batches()
    expected, gradients = by_hand(batches, [[5, 5, 3]])
    module = TokenModel()
    callback = GradientAccumulation(5, normalize="tokens", count=lambda batch: (batch["labels"] >= 0).sum().item())
    fit(module, batches, callback)
    assert_same_steps(module, expected, gradients)


def test_a_batch_whose_tokens_are_all_masked_weighs_nothing():
    batches = token_batches((5, 0, 3, 0, 0, 4))
    expected, gradients = by_hand(batches, [[3, 3]])
    module = TokenModel()
    fit(module, batches, GradientAccumulation(3, normalize="tokens", mask_key="labels"))
    assert_same_steps(module, expected, gradients)


def test_samples_weigh_the_same_where_batches_differ_in_size():
    entry = ZOO["mlp"]
    samples = entry.loader(batches=1, batch_size=20).dataset

    def sizes(*lengths):
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return DataLoader(
            samples, batch_sampler=[list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
        )

    large = train(entry.build(), sizes(12, 8), steps=-1, max_epochs=2)
    callback = GradientAccumulation(3, normalize="samples")
    ours = train(entry.build(), sizes(2, 7, 3, 5, 3), steps=-1, max_epochs=2, callbacks=[callback])
    assert_same_training(large, ours, compare_losses=False)


def test_a_batch_whose_samples_cannot_be_counted_is_refused_with_what_accumulation_has_for_it():
    batches = [{"x": torch.randn(2, 4), "labels": torch.zeros(3, dtype=torch.long)}]
    with pytest.raises(MisconfigurationException, match=r"\['x'\]: 2.*normalize='samples' counts.*`count`") as caught:
        fit(TokenModel(), batches, GradientAccumulation(2, normalize="samples"))
    assert "split" not in str(caught.value)


def test_the_short_last_window_is_divided_by_its_true_length():
    entry = ZOO["mlp"]
    large = train(entry.build(), DataLoader(entry.loader(5).dataset, batch_size=24), steps=-1, max_epochs=1)
    ours = train(entry.build(), entry.loader(5), steps=-1, max_epochs=1, callbacks=[GradientAccumulation(3)])
    assert_same_training(large, ours, compare_losses=False)  # 40 samples: 24 and 16


class Stream(IterableDataset):
    """Batches of which nobody knows how many there are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    ("dataset", "options", "used"),
    [
        (Stream, {}, 13),
        (list, {"limit_train_batches": 9}, 9),
        (Stream, {"limit_train_batches": 9}, 9),
        (list, {"overfit_batches": 3}, 3),
        (list, {"val_check_interval": 3}, 13),  # validation in the middle of windows
    ],
    ids=str,
)
def test_the_last_window_is_right_however_the_trainer_ends_the_epoch(dataset, options, used):
    class Validates(TokenModel):
        def validation_step(self, batch, batch_idx):
            assert not torch.is_grad_enabled()
            self.log("val_loss", self.loss(batch))

    batches = token_batches()
    windows = [min(4, used - start) for start in range(0, used, 4)]
    expected, gradients = by_hand(batches[:used], [windows] * 2, epochs=2)
    module = Validates()
    callback = GradientAccumulation(4, normalize="tokens", mask_key="labels")
    trainer = quiet_trainer(-1, callback, max_epochs=2, num_sanity_val_steps=0, **options)
    trainer.fit(module, loader(dataset(batches)), loader(batches[:1]))
    assert_same_steps(module, expected, gradients)
    assert trainer.global_step == len(gradients)


@pytest.mark.parametrize(
    ("schedule", "windows"),  # by optimizer step; the lengths of the windows in three epochs of 13 batches
    [
        ({0: 2, 3: 4, 7: 3}, [[2, 2, 2, 4, 3], [4, 4, 3, 2], [3, 3, 3, 3, 1]]),
        ({0: 3, 1: 1, 6: 5}, [[3, 1, 1, 1, 1, 1, 5], [5, 5, 3], [5, 5, 3]]),
        (lambda step: step + 1, [[1, 2, 3, 4, 3], [6, 7], [8, 5]]),
    ],
)
def test_a_factor_that_changes_in_mid_epoch_never_mixes_windows(schedule, windows):
    batches = token_batches()
    expected, gradients = by_hand(batches, windows, epochs=3)
    module = TokenModel()
    callback = GradientAccumulation(schedule, by="step", normalize="tokens", mask_key="labels")
    run = fit(module, batches, callback, epochs=3)
    assert_same_steps(module, expected, gradients)
    assert run.trainer.global_step == len(gradients)


def test_a_schedule_by_epoch_changes_with_the_epoch():
    batches = token_batches()
    windows = [[1] * 13, [5, 5, 3], [5, 5, 3], [13]]
    expected, gradients = by_hand(batches, windows, epochs=4)
    module = TokenModel()
    fit(module, batches, GradientAccumulation({1: 5, 3: 100}, normalize="tokens", mask_key="labels"), epochs=4)
    assert_same_steps(module, expected, gradients)


def test_max_steps_ends_training_after_that_many_optimizer_steps():
    module = TokenModel()
    run = train(module, loader(token_batches()), steps=5, callbacks=[GradientAccumulation({0: 2, 2: 4}, by="step")])
    assert run.trainer.global_step == len(module.gradients) == 5
    assert len(run.losses) == 2 + 2 + 4 + 4 + 1


class _StopAfter(Callback):
    """Stops as a crash would, leaving a checkpoint of that moment."""

    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop here")


class ResumableLoader(DataLoader):
    """Continues where the checkpoint left it, as a stateful loader does."""

    skip = 0

    def __iter__(self):
        iterator = super().__iter__()
        for _ in range(self.skip):
            next(iterator)
        self.skip = 0
        return iterator

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(("stop", "skip"), [(6, 6), (17, 4)])
def test_resuming_from_the_middle_of_an_epoch_goes_on_with_the_same_windows(tmp_path, stop, skip):
    batches = token_batches()
    windows = [[2, 2, 2, 4, 3], [4, 4, 3, 2], [3, 3, 3, 3, 1]]  # a window ends after batch 6, and after 13 + 4
    expected, gradients = by_hand(batches, windows, epochs=3)

    def callback():
        return GradientAccumulation({0: 2, 3: 4, 7: 3}, by="step", normalize="tokens", mask_key="labels")

    path = tmp_path / "middle.ckpt"
    first = TokenModel()
    with pytest.raises(KeyError, match="stop here"):
        train(first, loader(batches), steps=-1, max_epochs=3, callbacks=[callback(), _StopAfter(stop, path)])
    again = TokenModel()
    resumable = ResumableLoader(batches, batch_size=None)
    resumable.skip = skip
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=3,
        callbacks=[callback()],
    )  # fmt: skip
    trainer.fit(again, resumable, ckpt_path=path, weights_only=False)
    again.gradients = first.gradients + again.gradients
    assert_same_steps(again, expected, gradients)


def test_a_window_cut_by_a_checkpoint_ends_where_it_would_have_with_the_batches_that_remain(tmp_path):
    batches = token_batches()
    path = tmp_path / "middle.ckpt"
    with pytest.raises(KeyError, match="stop here"):
        fit_callbacks = [GradientAccumulation(4), _StopAfter(6, path)]
        train(TokenModel(), loader(batches), steps=-1, max_epochs=1, callbacks=fit_callbacks)
    again = TokenModel()
    resumable = ResumableLoader(batches, batch_size=None)
    resumable.skip = 6
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=1,
        callbacks=[GradientAccumulation(4, normalize="tokens", mask_key="labels")],
    )  # fmt: skip
    start = torch.load(path, weights_only=False)["state_dict"]
    trainer.fit(again, resumable, ckpt_path=path, weights_only=False)
    assert trainer.global_step == 4  # after batches 4, 8, 12 and 13
    hand = TokenModel()
    hand.load_state_dict(start)
    hand.loss({key: torch.cat([batch[key] for batch in batches[6:8]]) for key in batches[0]}).backward()
    torch.testing.assert_close(again.gradients[0], hand.net.weight.grad)


def test_a_step_that_returns_none_weighs_nothing():
    class Skipping(TokenModel):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 4, 8) else self.loss(batch)  # first, inside, and last of a window of 3

    batches = token_batches((5, 3, 9, 2, 7, 4, 6, 8, 1))
    module = Skipping()
    run = fit(module, batches, GradientAccumulation(3, normalize="tokens", mask_key="labels"))
    _, gradients = by_hand([batch for i, batch in enumerate(batches) if i not in (0, 4, 8)], [[2, 2, 2]])
    assert run.trainer.global_step == 3
    torch.testing.assert_close(torch.stack(module.gradients), torch.stack(gradients))


def test_the_loss_scale_of_fp16_and_the_weights_of_tokens_do_not_get_in_each_others_way():
    batches = token_batches()
    expected, gradients = by_hand(batches, [[4, 4, 4, 1]])
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    plugin = pl.plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    module = TokenModel()
    fit(module, batches, GradientAccumulation(4, normalize="tokens", mask_key="labels"), plugins=[plugin])
    assert_same_steps(module, expected, gradients)


def test_the_effective_batch_size_is_told_once_and_again_when_the_factor_changes(caplog):
    entry = ZOO["mlp"]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        callbacks = [GradientAccumulation({0: 4, 2: 2}, by="step")]
        train(entry.build(), entry.loader(12), steps=4, callbacks=callbacks)
    told = [message for message in caplog.messages if "effective" in message]
    assert told == [
        "effective batch size 32 = 8 x 4 accumulated x 1 device",
        "effective batch size 16 = 8 x 2 accumulated x 1 device",
    ]


@pytest.mark.parametrize("raises", [False, True])
def test_the_trainer_is_as_before_after_fit_also_when_training_raises(raises):
    class Raising(TokenModel):
        def training_step(self, batch, batch_idx):
            if raises and batch_idx == 3:
                raise KeyError("no")
            return super().training_step(batch, batch_idx)

    seen = {}

    class See(Callback):
        def setup(self, trainer, module, stage):
            seen["loop"] = vars(trainer.fit_loop.epoch_loop).keys() | set()
            seen["optimization"] = vars(trainer.fit_loop.epoch_loop.automatic_optimization).keys() | set()
            seen["trainer"] = trainer

    try:
        train(Raising(), loader(token_batches()), steps=3, callbacks=[See(), GradientAccumulation(4)])
    except KeyError:
        assert raises
    trainer = seen["trainer"]
    assert trainer.accumulate_grad_batches == 1
    assert vars(trainer.fit_loop.epoch_loop).keys() == seen["loop"]
    assert vars(trainer.fit_loop.epoch_loop.automatic_optimization).keys() == seen["optimization"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "neither was given"),
        ({"schedule": 2, "target_batch_size": 8}, "both were given"),
        ({"schedule": {}}, "the schedule is empty"),
        ({"schedule": 0}, "schedule is 0"),
        ({"schedule": {0: 2, 3: 0}}, r"schedule\[3\] is 0"),
        ({"schedule": {-1: 2}}, "key -1"),
        ({"schedule": {0: 1.5}}, r"schedule\[0\] is 1.5"),
        ({"schedule": 2, "by": "batch"}, "by='batch' is unknown"),
        ({"schedule": 2, "normalize": "mean"}, "normalize='mean' is unknown"),
        ({"schedule": 2, "normalize": "tokens"}, "neither was given"),
        ({"schedule": 2, "normalize": "tokens", "count": len, "mask_key": "labels"}, "both were given"),
        ({"schedule": 2, "mask_key": "labels"}, "normalize='batch'"),
        ({"target_batch_size": 0}, "target_batch_size=0"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_given(arguments, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        GradientAccumulation(**arguments)


def test_a_second_accumulation_is_refused():
    entry = ZOO["mlp"]
    with pytest.raises(MisconfigurationException, match=r"Trainer\(accumulate_grad_batches=2\)"):
        train(entry.build(), entry.loader(), callbacks=[GradientAccumulation(2)], accumulate_grad_batches=2)
    callbacks = [GradientAccumulation(2), GradientAccumulationScheduler({0: 2})]
    with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler accumulates too"):
        train(entry.build(), entry.loader(), callbacks=callbacks)


def test_strategies_whose_pending_gradients_cannot_be_rescaled_are_refused_by_name(monkeypatch):
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    monkeypatch.setattr(type(trainer.strategy), "handles_gradient_accumulation", True)
    with pytest.raises(MisconfigurationException, match="SingleDeviceStrategy accumulates by itself"):
        GradientAccumulation(2).setup(trainer, TokenModel(), "fit")
    trainer._accelerator_connector.strategy = pl.strategies.FSDPStrategy()
    with pytest.raises(MisconfigurationException, match="FSDPStrategy keeps the gradients"):
        GradientAccumulation(2).setup(trainer, TokenModel(), "fit")


def test_a_mask_key_that_the_batch_lacks_is_refused_with_those_that_it_has():
    callback = GradientAccumulation(2, normalize="tokens", mask_key="attention_mask")
    with pytest.raises(MisconfigurationException, match=r"'attention_mask' names no tensor .*\['x', 'labels'\]"):
        fit(TokenModel(), token_batches(), callback)


def test_checkpoints_in_training_are_named_by_the_optimizer_step(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callbacks = [GradientAccumulation({0: 2, 3: 4}, by="step"), checkpoint]
    train(TokenModel(), loader(token_batches()), steps=5, callbacks=callbacks, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
