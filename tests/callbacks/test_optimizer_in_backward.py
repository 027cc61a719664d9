"""OptimizerInBackward under Lightning: parity over the zoo, and refusals by name."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_memopt import HalfPrecision, OptimizerInBackward
from tests.parity import Run, assert_same_training, train
from tests.zoo import ZOO, cases

AUTOMATIC = cases(only_automatic=True)


class _CountGradients(Callback):
    """Gradients alive when the forward begins and when the backward has ended."""

    def __init__(self) -> None:
        self.most = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.most = max(self.most, sum(p.grad is not None for p in module.parameters()))

    on_after_backward = lambda self, trainer, module: self.on_train_batch_start(trainer, module, None, 0)  # noqa: E731


def _assert_parity(name: str, **options) -> Run:
    entry = ZOO[name]
    plain = train(entry.build(), entry.loader(), **options)
    count = _CountGradients()
    stepped = train(entry.build(), entry.loader(), callbacks=[OptimizerInBackward(), count], **options)
    assert_same_training(plain, stepped, rtol=0, atol=0)
    assert count.most == 0
    assert stepped.trainer.global_step == plain.trainer.global_step == 20
    torch.testing.assert_close(
        stepped.trainer.optimizers[0].state_dict(), plain.trainer.optimizers[0].state_dict(), rtol=0, atol=0
    )
    return stepped


def _fit(name: str = "mlp", module: pl.LightningModule | None = None, callbacks=(), **options):
    entry = ZOO[name]
    loader = entry.loader(batches=4)
    return train(module or entry.build(), loader, steps=4, callbacks=[OptimizerInBackward(), *callbacks], **options)


@pytest.mark.parametrize("name", AUTOMATIC)
def test_training_is_bit_for_bit_that_of_the_plain_trainer_and_no_gradient_stays(name):
    _assert_parity(name)


def test_clipping_by_value_is_bit_for_bit_that_of_the_plain_trainer():
    run = _assert_parity("encoder", gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert run.trainer.gradient_clip_val == 0.01


PRECISIONS = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "64-true": lambda: {"precision": "64-true"},
    "nearest": lambda: {"plugins": [HalfPrecision("bf16", rounding="nearest")]},
    "kahan": lambda: {"plugins": [HalfPrecision("bf16", rounding="kahan")]},
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_precisions_train_as_without_the_callback(precision):
    entry = ZOO["encoder"]
    plain = train(entry.build(), entry.loader(), **PRECISIONS[precision]())
    stepped = train(entry.build(), entry.loader(), callbacks=[OptimizerInBackward()], **PRECISIONS[precision]())
    assert_same_training(plain, stepped, rtol=0, atol=0)


def test_the_module_is_as_the_user_wrote_it_after_fit():
    run = _fit()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in run.module.parameters())
    assert not run.trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not run.trainer.optimizers[0]._optimizer_step_post_hooks


def test_the_module_is_as_the_user_wrote_it_after_training_raised():
    class Failing(type(ZOO["mlp"].build())):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken batch")
            return super().training_step(batch, batch_idx)

    module = Failing(0.0)
    with pytest.raises(RuntimeError, match="broken batch"):
        _fit(module=module)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())


def test_an_error_in_the_middle_of_the_backward_reaches_the_user_and_leaves_no_hook():
    module = ZOO["mlp"].build()

    def fail(_):
        raise RuntimeError("broken backward")

    module.net[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="broken backward"):
        _fit(module=module)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())


@pytest.mark.parametrize("where", ["before", "within"])
def test_what_saves_on_an_exception_saves_no_weights_that_are_in_part_a_step_on(where, tmp_path):
    module, saved = ZOO["mlp"].build(), ModelCheckpoint(tmp_path / "saved", save_on_exception=True)
    seen = []

    def fail(_):
        seen.append(module.net[-1].weight.detach().clone())
        if len(seen) == 3:
            raise RuntimeError("broken backward")

    if where == "within":
        module.net[0].weight.register_hook(fail)  # whose gradient comes last
    else:
        module.net.register_full_backward_pre_hook(lambda net, gradients: fail(gradients))
    with warnings.catch_warnings(record=True) as warned, pytest.raises(RuntimeError, match="broken backward"):
        warnings.simplefilter("always")
        _fit(module=module, callbacks=[saved, OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    is_warned = any("No checkpoint is saved on RuntimeError" in str(warning.message) for warning in warned)
    files = [*(tmp_path / "saved").glob("*.ckpt"), *tmp_path.glob("*.ckpt")]
    assert is_warned == (where == "within") and len(files) == (0 if is_warned else 2)
    for file in files:
        weights = torch.load(file, weights_only=False)["state_dict"]
        torch.testing.assert_close(weights, module.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(weights["net.5.weight"], seen[-1], rtol=0, atol=0)
    assert "on_exception" not in vars(saved)


def test_a_loss_that_is_nan_and_a_batch_without_a_loss_do_what_they_do_in_plain_lightning():
    class Odd(type(ZOO["mlp"].build())):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return [loss, None, loss, loss * float("nan")][batch_idx]

    entry = ZOO["mlp"]
    torch.manual_seed(0)
    first = Odd(0.0)
    second = Odd(0.0)
    second.load_state_dict(first.state_dict())
    plain = train(first, entry.loader(batches=4), steps=4)
    stepped = _fit(module=second)
    assert plain.weights["net.0.weight"].isnan().all()
    for name, weight in plain.weights.items():
        assert torch.equal(weight.isnan(), stepped.weights[name].isnan())


def test_resuming_in_mid_epoch_gives_what_plain_lightning_gives(tmp_path):
    entry = ZOO["encoder"]

    def fit(*callbacks, ckpt_path=None):
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=12 if ckpt_path else 7, max_epochs=-1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=list(callbacks),
        )  # fmt: skip
        module = entry.build()
        trainer.fit(module, entry.loader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.state_dict()

    fit()
    plain = fit(ckpt_path=tmp_path / "last.ckpt")
    fit(OptimizerInBackward())
    stepped = fit(OptimizerInBackward(), ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(stepped, plain, rtol=0, atol=0)


def test_a_checkpoint_of_the_plain_trainer_can_be_resumed_with_the_callback(tmp_path):
    entry = ZOO["mlp"]

    def trainer(steps, *callbacks):
        return pl.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=list(callbacks), enable_checkpointing=False,
        )  # fmt: skip

    first = trainer(5)
    first.fit(entry.build(), entry.loader())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    results = []
    for callbacks in ([], [OptimizerInBackward()]):
        module = entry.build()
        trainer(12, *callbacks).fit(module, entry.loader(), ckpt_path=tmp_path / "plain.ckpt")
        results.append(module.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
def test_warm_up_in_an_overridden_optimizer_step_works(half):
    class WarmsUp(type(ZOO["mlp"].build())):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (batch_idx + 1) / 3)
            optimizer.step(closure=optimizer_closure)

    first, second = WarmsUp(0.0), WarmsUp(0.0)
    second.load_state_dict(first.state_dict())
    plugins = [HalfPrecision("bf16", rounding="nearest")] if half else []
    plain = train(first, ZOO["mlp"].loader(batches=4), steps=4, plugins=plugins)
    plugins = [HalfPrecision("bf16", rounding="nearest")] if half else []
    run = _fit(module=second, plugins=plugins)
    assert_same_training(plain, run, rtol=0, atol=0)
    assert "optimizer_step" not in vars(run.trainer.strategy)


def test_an_optimizer_step_that_runs_the_closure_by_itself_is_refused_before_the_first_backward():
    class Skips(type(ZOO["mlp"].build())):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            if batch_idx % 2:
                optimizer.step()

    module = Skips(0.0)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"`Skips\.optimizer_step` runs the closure outside"):
        _fit(module=module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_hooks_that_read_gradients_are_warned_by_name_and_still_run():
    class Logs(type(ZOO["mlp"].build())):
        calls = 0

        def on_before_optimizer_step(self, optimizer):
            self.calls += 1

    module = Logs(0.0)
    with pytest.warns(UserWarning, match=r"`Logs\.on_before_optimizer_step` finds no gradients"):
        _fit(module=module)
    assert module.calls == 4


def test_a_users_callback_that_reads_gradients_is_warned_by_name():
    class LogsNorms(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            pass

    with pytest.warns(UserWarning, match=r"`LogsNorms\.on_before_zero_grad` finds no gradients"):
        _fit(callbacks=[LogsNorms()])


@pytest.mark.parametrize("keep", [1, 2], ids=["always clears", "clears every second batch"])
def test_an_optimizer_zero_grad_that_leaves_gradients_is_refused_before_they_are_missed(keep):
    class Clears(type(ZOO["mlp"].build())):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            if batch_idx % keep == 0:
                optimizer.zero_grad(set_to_none=False)

    first, second = Clears(0.0), Clears(0.0)
    second.load_state_dict(first.state_dict())
    if keep == 1:
        plain = train(first, ZOO["mlp"].loader(batches=4), steps=4)
        assert_same_training(plain, _fit(module=second), rtol=0, atol=0)
    else:
        train(first, ZOO["mlp"].loader(batches=4), steps=1)
        with pytest.raises(
            MisconfigurationException, match=r"`Clears\.optimizer_zero_grad` leaves gradients .*batch 1"
        ):
            _fit(module=second)
        torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert "optimizer_zero_grad" not in vars(second)


class _OverridesClipping(type(ZOO["mlp"].build())):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.5, "norm")


class _UsesLBFGS(type(ZOO["mlp"].build())):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class GradientAccumulation(Callback):
    """Stands for the callback of that name."""


class MicroBatching(Callback):
    """Stands for the callback of that name."""


REFUSALS = {
    "clipping by norm": ({"gradient_clip_val": 0.5}, "`gradient_clip_val=0.5` clips by the norm"),
    "accumulation": ({"accumulate_grad_batches": 2}, "`accumulate_grad_batches=2` sums gradients"),
    "accumulation schedule": (
        {"callbacks": [GradientAccumulationScheduler({1: 2})]},
        "GradientAccumulationScheduler sums gradients",
    ),
    "our accumulation": ({"callbacks": [GradientAccumulation()]}, "GradientAccumulation sums gradients"),
    "micro-batches": ({"callbacks": [MicroBatching()]}, "MicroBatching sums gradients"),
    "manual optimization": ({"name": "gan"}, "`GAN` optimizes manually"),
    "own clipping": ({"module": _OverridesClipping(0.0)}, r"`_OverridesClipping\.configure_gradient_clipping`"),
    "LBFGS": ({"module": _UsesLBFGS(0.0)}, "LBFGS cannot step one parameter at a time"),
    "several devices": ({"strategy": "ddp"}, "DDPStrategy reduces gradients"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_needs_all_gradients_at_once_is_refused_by_name_before_the_first_step(case):
    options, message = REFUSALS[case]
    try:
        with pytest.raises(MisconfigurationException, match=message) as error:
            _fit(**options)
    finally:
        if torch.distributed.is_initialized():  # Lightning's DDP leaves its group of one
            torch.distributed.destroy_process_group()
    assert "OptimizerInBackward cannot work here" in str(error.value)


def test_fp16_loss_scaling_is_refused_by_name():
    scaling = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="MixedPrecision scales the fp16 loss"):
        _fit(plugins=[scaling])


def test_a_subclass_of_an_accumulating_callback_is_refused_too():
    class Mine(MicroBatching):
        pass

    entry = ZOO["mlp"]
    with pytest.raises(MisconfigurationException, match="Mine sums gradients over several backwards"):
        train(entry.build(), entry.loader(), callbacks=[OptimizerInBackward(), Mine()])


class SparseGradients(pl.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.bag = torch.nn.EmbeddingBag(20, 4, sparse=True)
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.bag(batch).square().mean()

    def configure_optimizers(self):
        return self.optimizer(list(self.parameters()), lr=0.1)


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients_train_as_without_the_callback(optimizer):
    batches = DataLoader(torch.arange(20).reshape(10, 2), batch_size=2)
    plain = train(SparseGradients(optimizer), batches, steps=4)
    ours = train(SparseGradients(optimizer), batches, steps=4, callbacks=[OptimizerInBackward()])
    assert_same_training(plain, ours)
