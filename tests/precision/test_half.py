from dataclasses import dataclass
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memopt import HalfPrecision, LowBitOptimizer, OptimizerInBackward
from tests.parity import assert_same_training, train
from tests.zoo import ZOO
from tests.zoo.entry import Samples

# Of the mean loss of 10 steps: bfloat16 has 8 bits, and its rounding errors in single steps average out.
TOLERANCE = 0.03


@pytest.mark.parametrize(
    ("name", "rounding"),
    [(name, "stochastic") for name, entry in ZOO.items() if entry.automatic]
    + [("gpt2", "kahan"), ("cnn", "kahan"), ("gpt2", "nearest")],
)
def test_every_module_of_the_zoo_trains_in_bf16_close_to_float32_and_comes_back_as_it_was_written(name, rounding):
    entry = ZOO[name]
    options = {"steps": 10, "gradient_clip_val": 0.5}
    plain = train(entry.build(), entry.loader(), **options)
    module = entry.build()
    half = train(module, entry.loader(), plugins=[HalfPrecision("bf16", rounding=rounding)], **options)
    assert list(half.weights) == list(plain.weights)
    assert [weight.dtype for weight in half.weights.values()] == [weight.dtype for weight in plain.weights.values()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    mean, expected = torch.tensor(half.losses).mean(), torch.tensor(plain.losses).mean()
    assert abs(mean - expected) < TOLERANCE * abs(expected)


@pytest.mark.slow
def test_a_small_gpt_ends_within_two_percent_of_float32_after_60_steps():
    entry = ZOO["gpt2"]
    loader = entry.loader(batches=3)
    plain = train(entry.build(), loader, steps=60)
    for rounding in ("stochastic", "kahan"):
        half = train(entry.build(), loader, steps=60, plugins=[HalfPrecision("bf16", rounding=rounding)])
        final, expected = (torch.tensor(run.losses[-3:]).mean() for run in (half, plain))
        assert expected < 0.95 * plain.losses[0]
        assert abs(final - expected) < 0.02 * expected, rounding


class _Slope(pl.LightningModule):
    """Weights between 1 and 2, pulled down by AdamW in steps of 1e-4: a 78th of their last bit in bfloat16."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter((1 + torch.rand(4, 16384, generator=generator)).bfloat16().float())

    def training_step(self, batch, batch_idx):
        return (self.weight * (1 + batch[1].view(-1, 1) % 4)).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.0)


def test_where_nearest_rounding_loses_every_update_stochastic_and_kahan_follow_float32():
    def moved(*plugins):
        loader = ZOO["mlp"].loader(batches=100, batch_size=4)
        return train(_Slope(), loader, steps=100, plugins=list(plugins)).weights["weight"] - _Slope().weight.detach()

    exact = moved()
    assert (exact + 100 * 1e-4).abs().max() < 0.002
    assert moved(HalfPrecision("bf16", rounding="nearest")).abs().max() == 0
    last_bit = 2.0**-7
    # A weight that moves by 0.009 in jumps of a bit spreads by 0.0084; the mean of 65536 by 3.3e-5.
    assert (moved(HalfPrecision("bf16", rounding="stochastic")) - exact).mean().abs() < 5 * 3.3e-5
    assert (moved(HalfPrecision("bf16", rounding="kahan")) - exact).abs().max() < 0.6 * last_bit


class _Types(type(ZOO["gpt2"].build())):
    """Notes the types that it sees in training."""

    def training_step(self, batch, batch_idx):
        self.seen = {name: parameter.dtype for name, parameter in self.named_parameters()}
        return super().training_step(batch, batch_idx)


def _typed_gpt():
    return _Types(ZOO["gpt2"].build().model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_training_norms_are_float32_the_rest_16_bits_and_ties_hold(dtype):
    module = _typed_gpt().to(dtype)
    train(module, ZOO["gpt2"].loader(), steps=1, plugins=[HalfPrecision("bf16")])
    norms = {name for name in module.seen if ".ln_" in name}
    assert norms
    assert all((dtype == torch.float32) == (name in norms) for name, dtype in module.seen.items())
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_a_module_of_another_type_trains_with_float32_norms_as_a_float32_one_and_gets_its_type_back(name, dtype):
    entry, loader = ZOO[name], ZOO[name].loader(3)
    rounded, typed = entry.build().bfloat16(), entry.build().to(dtype)
    for module in (rounded.float(), typed):
        train(module, loader, steps=3, plugins=[HalfPrecision("bf16", rounding="kahan")])
    assert {tensor.dtype for tensor in typed.state_dict().values() if tensor.is_floating_point()} == {dtype}
    for expected, weight in zip(rounded.parameters(), typed.parameters(), strict=True):
        torch.testing.assert_close(weight.float(), expected.to(dtype).float(), rtol=0.02, atol=2e-3)


def test_modules_named_by_pattern_stay_in_float32_with_what_is_below_them():
    module = _typed_gpt()
    plugin = HalfPrecision("bf16", keep_fp32=["model.transformer.h.1"])
    train(module, ZOO["gpt2"].loader(), steps=2, plugins=[plugin])
    assert all(
        (dtype == torch.float32) == name.startswith("model.transformer.h.1.") for name, dtype in module.seen.items()
    )


def test_training_that_raises_brings_the_types_back_too():
    class Raises(type(ZOO["mlp"].build())):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Raises(0.0)
    with pytest.raises(ZeroDivisionError):
        train(module, ZOO["mlp"].loader(), plugins=[HalfPrecision("bf16")])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_weights_bit_for_bit(rounding, tmp_path):
    entry = ZOO["mlp"]
    # The same batch 20 times: where Lightning resumes a plain DataLoader does not matter here.
    loader = DataLoader(20 * Samples(entry.sample, 8).samples, batch_size=8)

    def fit(module, steps, **options):
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=steps,
            enable_model_summary=False, plugins=[HalfPrecision("bf16", rounding=rounding)],
            callbacks=options.pop("callbacks", []),
        )  # fmt: skip
        trainer.fit(module, loader, **options)
        return module

    class SaveAt5(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "5.ckpt")

    straight = fit(entry.build(), 10, callbacks=[SaveAt5()])
    checkpoint = torch.load(tmp_path / "5.ckpt", weights_only=False)
    assert checkpoint["state_dict"]["net.0.weight"].dtype == torch.bfloat16
    plain = entry.build()
    plain.load_state_dict(checkpoint["state_dict"])
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}

    torch.manual_seed(99)
    resumed = fit(entry.build(seed=5), 10, ckpt_path=tmp_path / "5.ckpt")
    for name, weight in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_dropout_sees_the_same_random_numbers_with_stochastic_rounding_as_with_kahan():
    after = []
    for rounding in ("stochastic", "kahan"):
        train(ZOO["mlp"].build(0.5), ZOO["mlp"].loader(), steps=4, plugins=[HalfPrecision(rounding=rounding)])
        after.append(torch.rand(4))
    assert torch.equal(*after)


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_stepping_in_the_backward_gives_the_same_weights_bit_for_bit(rounding):
    entry = ZOO["gpt2"]
    in_loop, in_backward = (
        train(entry.build(), entry.loader(), steps=5, plugins=[HalfPrecision(rounding=rounding)], callbacks=callbacks)
        for callbacks in ([], [OptimizerInBackward()])
    )
    assert_same_training(in_loop, in_backward, rtol=0, atol=0)


def test_low_bit_state_is_kept_next_to_16_bit_weights():
    entry = ZOO["gpt2"]
    plain = train(entry.build(), entry.loader(), steps=5)
    callbacks = [OptimizerInBackward(), LowBitOptimizer(8)]
    run = train(
        entry.build(), entry.loader(), steps=5, plugins=[HalfPrecision(rounding="kahan")], callbacks=callbacks
    )
    assert_same_training(plain, run, rtol=0.05, atol=5e-3)


def test_gan_trains_with_its_two_optimizers_stepped_by_hand():
    entry = ZOO["gan"]
    plain = train(entry.build(), entry.loader(), steps=8)
    half = train(entry.build(), entry.loader(), steps=8, plugins=[HalfPrecision("bf16", rounding="kahan")])
    for name, weight in plain.weights.items():
        torch.testing.assert_close(half.weights[name], weight, rtol=0.02, atol=0.01)


def test_fp16_without_a_loss_scale_trains_a_small_module():
    entry = ZOO["mlp"]
    plain = train(entry.build(), entry.loader(), steps=10)
    half = train(entry.build(), entry.loader(), steps=10, plugins=[HalfPrecision("fp16", rounding="kahan")])
    torch.testing.assert_close(torch.tensor(half.losses), torch.tensor(plain.losses), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, "dtype='fp8'.*'bf16', 'fp16'"),
        ({"rounding": "up"}, "rounding='up'.*'nearest', 'stochastic', 'kahan'"),
        ({"dtype": "fp16", "rounding": "stochastic"}, r"underflow.*MixedPrecision\('fp16'\)"),
        ({"keep_fp32": "norm"}, "must be a sequence of names"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_possible(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        HalfPrecision(**arguments)


class _Lbfgs(type(ZOO["mlp"].build())):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "plugin", "message"),
    [
        (ZOO["gpt2"].build, lambda: HalfPrecision(keep_fp32=["model.lm_haed"]), r"model\.lm_haed.*LossInside"),
        (ZOO["gpt2"].build, lambda: HalfPrecision(keep_fp32=["model.lm_head"]), r"model\.lm_head\.weight.*tied to"),
        (lambda: _Lbfgs(0.0), HalfPrecision, "LBFGS"),
    ],
)
def test_what_a_module_cannot_have_is_refused_before_the_first_step_and_leaves_it_alone(module, plugin, message):
    module = module()
    with pytest.raises(MisconfigurationException, match=message):
        train(module, ZOO["gpt2"].loader(), plugins=[plugin()])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_batch_norm_keeps_its_statistics_in_float32():
    class Notes(type(ZOO["cnn"].build())):
        def training_step(self, batch, batch_idx):
            norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
            self.types = {m.running_mean.dtype for m in norms} | {m.weight.dtype for m in norms}
            return super().training_step(batch, batch_idx)

    module = Notes(0.0)
    train(module, ZOO["cnn"].loader(), steps=1, plugins=[HalfPrecision()])
    assert module.types == {torch.float32}


@dataclass(frozen=True)
class _Frozen:
    x: torch.Tensor
    labels: torch.Tensor
    name: str = "frozen"

    def to(self, device, **_):
        return _Frozen(self.x.to(device), self.labels.to(device), self.name)


class _Pair(NamedTuple):
    inner: _Frozen
    weight: torch.Tensor


def test_batches_of_frozen_dataclasses_and_named_tuples_are_cast_where_they_are():
    seen = []

    class Reads(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return F.cross_entropy(self.net(batch.inner.x).float(), batch.inner.labels) * batch.weight.mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batch = _Pair(_Frozen(torch.randn(2, 4), torch.tensor([0, 2])), torch.ones(2))
    loader = DataLoader([batch], batch_size=None, collate_fn=lambda item: item)
    train(Reads(), loader, steps=1, plugins=[HalfPrecision("bf16")])
    assert isinstance(seen[0], _Pair) and seen[0].inner.name == "frozen"
    assert seen[0].inner.x.dtype is seen[0].weight.dtype is torch.bfloat16
    assert seen[0].inner.labels.dtype is torch.int64
    assert batch.inner.x.dtype is torch.float32
