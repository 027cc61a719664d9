"""LowBitOptimizer under Lightning: every module of the zoo, schedules, checkpoints, refusals."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt import LowBitOptimizer, OptimizerInBackward
from lightning_memopt.techniques.blockwise import as_packed
from lightning_memopt.techniques.low_bit import SMALLEST
from tests.callbacks.low_bit_on_two_ranks import final_weights
from tests.distributed import run_on_ranks
from tests.parity import assert_same_training, quiet_trainer, train
from tests.resuming import SavesAt, fit_same_batches
from tests.zoo import ZOO, cases

LOSS_TOLERANCE = {8: 1e-3, "fp8": 2e-3, 4: 1e-2}
"""Relative difference allowed between the losses of 20 steps with and without low-bit state."""


def _has_large_parameters(module: pl.LightningModule) -> bool:
    return any(parameter.numel() >= SMALLEST for parameter in module.parameters())


@pytest.mark.parametrize("name", cases())
def test_training_follows_that_of_the_plain_trainer_and_is_exact_where_all_parameters_are_small(name):
    entry = ZOO[name]
    plain = train(entry.build(), entry.loader())
    packed = train(entry.build(), entry.loader(), callbacks=[LowBitOptimizer(8)])
    if _has_large_parameters(plain.module):
        assert list(packed.weights) == list(plain.weights)
        torch.testing.assert_close(packed.losses, plain.losses, rtol=LOSS_TOLERANCE[8], atol=0)
    else:
        assert_same_training(plain, packed, rtol=0, atol=0)


@pytest.mark.parametrize("bits", LOSS_TOLERANCE)
def test_each_width_follows_the_plain_trainer_with_clipping_and_accumulation(bits):
    entry = ZOO["gpt2"]
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "steps": 10}
    plain = train(entry.build(), entry.loader(), **options)
    packed = train(entry.build(), entry.loader(), callbacks=[LowBitOptimizer(bits)], **options)
    assert packed.trainer.global_step == 10
    torch.testing.assert_close(packed.losses, plain.losses, rtol=LOSS_TOLERANCE[bits], atol=0)
    assert not torch.equal(
        packed.weights["model.transformer.wte.weight"], plain.weights["model.transformer.wte.weight"]
    )


def test_the_learning_rate_schedule_of_the_module_drives_the_optimizer():
    entry = ZOO["gpt2"]
    run = train(entry.build(), entry.loader(), callbacks=[LowBitOptimizer()])
    optimizer = run.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    assert run.trainer.lr_scheduler_configs[0].scheduler.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 20 / 40))


@pytest.mark.parametrize("low_bit_first", [True, False])
def test_with_the_optimizer_in_the_backward_in_either_order_the_numbers_are_the_same(low_bit_first):
    entry = ZOO["gpt2"]
    both = [LowBitOptimizer(), OptimizerInBackward()]
    alone = train(entry.build(), entry.loader(), callbacks=[LowBitOptimizer()])
    together = train(entry.build(), entry.loader(), callbacks=both if low_bit_first else both[::-1])
    assert_same_training(alone, together, rtol=0, atol=0)


def test_the_optimizer_is_as_the_user_made_it_after_fit():
    run = train(ZOO["gpt2"].build(), ZOO["gpt2"].loader(batches=3), steps=3, callbacks=[LowBitOptimizer()])
    optimizer = run.trainer.optimizers[0]
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")


def test_after_training_raised_the_step_is_the_users_and_a_checkpoint_can_still_be_saved(tmp_path):
    class Failing(type(ZOO["gpt2"].build())):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken batch")
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(4, LowBitOptimizer())
    module = Failing(ZOO["gpt2"].build().model)
    with pytest.raises(RuntimeError, match="broken batch"):
        trainer.fit(module, ZOO["gpt2"].loader(batches=4))
    assert not any("low_bit" in str(getattr(value, "__func__", "")) for value in vars(trainer.optimizers[0]).values())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = quiet_trainer(4, LowBitOptimizer())
    resumed.fit(ZOO["gpt2"].build(), ZOO["gpt2"].loader(batches=4), ckpt_path=tmp_path / "after.ckpt")
    assert resumed.global_step == 4


def test_a_checkpoint_of_mid_epoch_resumes_bit_for_bit(tmp_path):
    def fit(*callbacks, **options):
        return fit_same_batches(ZOO["gpt2"], 12, LowBitOptimizer(), *callbacks, **options).state_dict()

    whole = fit(SavesAt(tmp_path / "five.ckpt", 5))
    saved = torch.load(tmp_path / "five.ckpt", weights_only=True)
    (packed,) = saved["low_bit_optimizer_states"]
    assert packed and all(as_packed(state["exp_avg"]) for state in packed.values())
    assert not packed.keys() & saved["optimizer_states"][0]["state"].keys()
    torch.testing.assert_close(fit(ckpt_path=tmp_path / "five.ckpt"), whole, rtol=0, atol=0)


def test_what_is_saved_when_training_is_over_is_packed_again_to_what_it_was(tmp_path):
    def fit(epochs, **options):
        trainer, module = quiet_trainer(-1, LowBitOptimizer(), max_epochs=epochs), ZOO["gpt2"].build()
        trainer.fit(module, ZOO["gpt2"].loader(batches=4), **options)
        return trainer, module.state_dict()

    fit(1)[0].save_checkpoint(tmp_path / "over.ckpt")
    torch.testing.assert_close(fit(2, ckpt_path=tmp_path / "over.ckpt")[1], fit(2)[1], rtol=0, atol=0)


def test_a_checkpoint_without_the_callback_is_converted(tmp_path):
    entry = ZOO["gpt2"]
    quiet_trainer(8, SavesAt(tmp_path / "plain.ckpt", 5)).fit(entry.build(), entry.loader())
    converted = quiet_trainer(8, LowBitOptimizer())
    converted.fit(entry.build(), entry.loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert converted.global_step == 8


@pytest.mark.parametrize("name", ["gpt2", "gan"])
def test_resumed_without_the_callback_it_is_named_and_training_goes_on_with_fresh_state(tmp_path, name):
    entry, path = ZOO[name], tmp_path / "packed.ckpt"
    quiet_trainer(4, SavesAt(path, 4), LowBitOptimizer()).fit(entry.build(), entry.loader())
    plain = quiet_trainer(8)
    with pytest.warns(UserWarning, match="LowBitOptimizer"):
        plain.fit(entry.build(), entry.loader(), ckpt_path=path)
    assert plain.global_step == 8
    steps = {
        int(state["step"])
        for optimizer in plain.optimizers
        for parameter, state in optimizer.state.items()
        if parameter.numel() >= SMALLEST
    }
    assert not steps or max(steps) <= 4


@pytest.mark.distributed
def test_replicas_under_ddp_stay_equal_and_follow_one_device_with_both_batches():
    first, second = run_on_ranks(final_weights, 2, deadline_seconds=180)
    assert first == second
    batches = list(ZOO["mlp"].loader(batches=20))
    merged = [tuple(map(torch.cat, zip(*batches[i : i + 2], strict=True))) for i in range(0, 20, 2)]
    loader = torch.utils.data.DataLoader(merged, batch_size=None)
    one_device = train(ZOO["mlp"].build(), loader, steps=10, callbacks=[LowBitOptimizer(8)])
    # A gradient that differs in its last bit can be rounded to the neighbouring level.
    expected = one_device.weights["net.3.weight"].flatten()
    torch.testing.assert_close(torch.tensor(first), expected, rtol=0, atol=1e-4)
    assert (torch.tensor(first) - ZOO["mlp"].build().net[3].weight.flatten()).abs().max() > 1e-3


class _WithOptimizer(type(ZOO["mlp"].build())):
    def __init__(self, make) -> None:
        super().__init__(0.0)
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.RMSprop, "The optimizer is RMSprop"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "Group 0 of Adam has amsgrad=True"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "Group 0 of SGD has momentum=0"),
    ],
)
def test_optimizers_that_it_cannot_serve_are_refused_by_name_before_the_first_step(make, message):
    with pytest.raises(MisconfigurationException, match=f"LowBitOptimizer cannot work here: {message}"):
        quiet_trainer(2, LowBitOptimizer()).fit(_WithOptimizer(make), ZOO["mlp"].loader())


def test_an_unknown_width_is_refused_when_it_is_given():
    with pytest.raises(MisconfigurationException, match=r"bits=16 .* possible are 8, 4 and 'fp8'"):
        LowBitOptimizer(bits=16)
