"""QuantizationAwareTraining under Lightning: what is trained is what comes out, zeros and clusters included."""

import copy
import warnings
from functools import partial
from itertools import product

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memopt import (
    ActivationCheckpointing,
    ClusterWeights,
    ConstantSparsity,
    GradualPruning,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
    load_compressed,
    measure_memory,
    predict_memory,
)
from lightning_memopt.compression.fake_quantize import FakeQuantization
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.quantize import quantize
from tests.callbacks.classifier import (
    Classifier,
    assert_rounding_kept_what_was_learned,
    fit_signs,
    signs_loader,
    trainer_with,
)
from tests.parity import train
from tests.zoo import ZOO, slow_where

SCHEMES = ["int8", "int8_dynamic", "int4_weight_only", "nf4"]


FORWARDS = list(product(["encoder", "gpt2", "llama", "vit", "cnn"], SCHEMES))


@pytest.mark.parametrize(("name", "scheme"), slow_where(FORWARDS, [("cnn", "nf4")]))
def test_the_forward_in_training_is_that_of_the_quantized_module(name, scheme):
    entry = ZOO[name]
    module, batch = entry.build().eval(), entry.batch()
    module.log = lambda *_, **__: None
    plain = float(module.training_step(batch, 0))
    fake = FakeQuantization(module, scheme)
    trained = module.training_step(batch, 0)
    trained.backward()
    fake.remove()
    assert float(module.training_step(batch, 0)) == plain
    assert all(p.grad is not None for n, p in module.named_parameters() if "pooler" not in n)
    assert not any(name in vars(part) for part in module.modules() for name in part._parameters)
    quantize(module, scheme)
    assert float(trained) == pytest.approx(
        float(module.training_step(batch, 0)), rel=3e-3 if "dynamic" in scheme else 1e-5
    )
    assert float(trained) != plain


class _Attends(nn.Module):
    """Calls its layers by position, or by the names of their arguments."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.attention = nn.Linear(64, 64), nn.MultiheadAttention(64, 4, batch_first=True)
        self.by_name = by_name

    def forward(self, x):
        if not self.by_name:
            h = self.layer(x)
            return self.attention(h, h, h, need_weights=False)[0]
        h = self.layer(input=x)
        return self.attention(key=h, query=h, value=h, need_weights=False)[0]


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
def test_layers_that_are_called_with_named_arguments_are_rounded_and_observed_alike(scheme):
    found = []
    for by_name in (False, True):
        net, x = _Attends(by_name), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
        fake = FakeQuantization(net, scheme)
        net(x)
        assert set(fake.ranges) == ({"layer", "attention"} if scheme == "int8_static" else set())
        found.append(net(x).detach())
        fake.remove()
        assert not torch.equal(net(x), found[-1])
    assert torch.equal(*found)


def test_the_range_of_what_attention_reads_is_that_of_its_first_projection_and_not_of_its_last():
    net = _Attends(by_name=False)
    fake = FakeQuantization(net, "int8_static")
    net(torch.randn(2, 5, 64))
    fake.remove()
    done = quantize(net, "int8_static", input_ranges=fake.ranges)
    assert net.attention.in_proj_weight.inputs == list(fake.ranges["attention"])
    assert net.attention.out_proj.weight.inputs == "dynamic"
    assert list(done.fallbacks) == ["attention.out_proj.weight"]


class _ReadsItself(Classifier):
    """Reads the weight of its first layer beside calling the others."""

    def forward(self, x):
        h = nn.functional.linear(x, self.net[0].weight, self.net[0].bias)
        return self.head(self.net[2](h.relu()).relu())


def test_a_layer_whose_weight_is_read_and_which_is_not_called_is_said_to_train_as_it_is():
    with pytest.warns(UserWarning, match=r"'net.0.weight' were not rounded in the first batch"):
        fit_signs(QuantizationAwareTraining("int8"), _ReadsItself(), max_epochs=1)
    with warnings.catch_warnings(record=True) as said:
        fit_signs(QuantizationAwareTraining("int8"), max_epochs=1)
        fit_signs(QuantizationAwareTraining("int8", exclude="net.0"), _ReadsItself(), max_epochs=1)
    assert not [warning for warning in said if "not rounded" in str(warning.message)]


def test_gradients_pass_the_rounding_unchanged():
    net, x = nn.Sequential(nn.Linear(8, 4, bias=False)), torch.randn(16, 8)
    net(x).sum().backward()
    expected = net[0].weight.grad.clone()
    net.zero_grad()
    FakeQuantization(net, "int8")
    net(x).sum().backward()
    torch.testing.assert_close(net[0].weight.grad, expected)


@pytest.mark.parametrize("scheme", [*SCHEMES, "int8_static"])
def test_training_goes_on_and_the_copy_is_what_was_trained(scheme, tmp_path):
    callback = QuantizationAwareTraining(scheme, start_step=4, export_path=tmp_path / "net")
    trainer, module = fit_signs(callback)
    assert isinstance(callback.quantized.head.weight, PackedWeight)
    assert not isinstance(module.head.weight, PackedWeight) and not module.head._forward_pre_hooks
    assert_rounding_kept_what_was_learned(callback.report)
    predicted = torch.cat(trainer.predict(callback.quantized, signs_loader(1)))
    assert torch.equal(predicted, torch.cat(trainer.predict(load_compressed(tmp_path / "net"), signs_loader(1))))
    if scheme == "int8_static":
        low, high = callback.quantized.head.weight.inputs
        assert low <= 0 < high


def test_fine_tuning_for_4_bits_loses_less_than_fine_tuning_and_rounding_afterwards():
    torch.manual_seed(1)
    trained = Classifier(128)
    trainer_with(max_epochs=6).fit(trained, signs_loader(), signs_loader(1))
    losses = []
    for callback in (QuantizeOnFitEnd("nf4"), QuantizationAwareTraining("nf4")):
        module = copy.deepcopy(trained)
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=1e-2)
        torch.manual_seed(0)
        trainer_with(callback, max_epochs=4).fit(module, signs_loader(), signs_loader())
        losses.append(callback.report.metrics_after["val_loss"])
    assert losses[1] < losses[0]


class _Watch(pl.Callback):
    def __init__(self, callback) -> None:
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        fake = self.callback._fake
        self.seen.append((fake.enabled, fake.observing, fake.ranges["head"]))


def test_rounding_starts_and_ranges_freeze_at_their_steps():
    callback = QuantizationAwareTraining("int8_static", start_step=3, freeze_observers_step=6)
    watch = _Watch(callback)
    fit_signs(callback, None, watch, max_epochs=-1, max_steps=9)
    assert [enabled for enabled, *_ in watch.seen] == [False] * 3 + [True] * 6
    assert [observing for _, observing, _ in watch.seen] == [True] * 6 + [False] * 3
    ranges = [value for *_, value in watch.seen]
    assert len(set(ranges[:6])) == 6 and len(set(ranges[5:])) == 1


class _CompiledInPlace(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="aot_eager")


class _CompiledWrapper(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")


def test_compiled_code_rounds_when_it_is_told_to_and_no_longer():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    plain, packed = net(x), copy.deepcopy(net)
    quantize(packed, "int4_weight_only")
    net.compile(backend="aot_eager")
    fake = FakeQuantization(net, "int4_weight_only")
    for enabled, expected in ((False, plain), (True, packed(x))):
        fake.set(enabled=enabled, observing=True)
        torch.testing.assert_close(net(x), expected)
    assert not torch.allclose(plain, packed(x))
    fake.remove()
    torch.testing.assert_close(net(x), plain)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("cls", [_CompiledInPlace, _CompiledWrapper])
@pytest.mark.parametrize("scheme", ["int8_static", "int4_weight_only"])
def test_compiled_parts_are_rounded_from_the_same_steps_on_and_not_after_training(cls, scheme):
    def run(make):
        torch._dynamo.reset()
        torch.manual_seed(0)
        callback = QuantizationAwareTraining(scheme, start_step=3, freeze_observers_step=5)
        _, module = fit_signs(callback, make(), max_epochs=1)
        logits = module.eval()(torch.ones(2, 16)).detach()
        return [*module.parameters()], callback.report.metrics_before, logits

    plain, compiled = run(Classifier), run(cls)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, plain)


def test_before_its_first_step_training_is_plain():
    entry = ZOO["gpt2"]
    plain = train(entry.build(), entry.loader(batches=4), steps=4)
    callback = QuantizationAwareTraining("int8", start_step=4, convert_on_fit_end=False)
    with pytest.warns(UserWarning, match="rounding begins after step 4, and training ends after 4"):
        run = train(entry.build(), entry.loader(batches=4), steps=4, callbacks=[callback])
    assert all(torch.equal(run.weights[key], plain.weights[key]) for key in plain.weights)
    assert callback.quantized is None


def test_training_that_stops_before_anything_is_rounded_is_said_to_have_done_so():
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    callback, entry = QuantizationAwareTraining("int8", start_step=4, convert_on_fit_end=False), ZOO["mlp"]
    with pytest.warns(UserWarning, match="rounding begins after step 4, and training ends after 1"):
        train(entry.build(), entry.loader(batches=8), steps=8, callbacks=[callback, Stops()])


def test_resuming_has_the_ranges_of_the_uninterrupted_run(tmp_path):
    def run(steps, **options):
        torch.manual_seed(0)
        callback = QuantizationAwareTraining("int8_static")
        trainer = trainer_with(callback, max_epochs=-1, max_steps=steps)
        module = Classifier()
        trainer.fit(module, signs_loader(), signs_loader(1), **options)
        return trainer, module, callback

    _, whole, expected = run(16)
    trainer, *_ = run(8)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, module, callback = run(16, ckpt_path=tmp_path / "half.ckpt")
    assert callback._ranges == expected._ranges
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "nf4"])
def test_with_gradual_pruning_the_zeros_stay_zeros(scheme):
    callback = QuantizationAwareTraining(scheme)
    _, module = fit_signs(callback, None, GradualPruning(ConstantSparsity(0.75, begin_step=4)))
    for name, packed in callback.quantized.named_parameters():
        if isinstance(packed, PackedWeight):
            zeros = module.get_parameter(name) == 0
            assert zeros.float().mean() == pytest.approx(0.75, abs=0.02)
            assert (packed.dequantize()[zeros] == 0).all()


def test_with_clustering_the_clusters_stay_clusters():
    callback = QuantizationAwareTraining("int8")
    torch.manual_seed(0)  # before the module is made: what it learns in so few steps depends on where it starts
    module = Classifier(128)
    trainer_with(ClusterWeights(16, begin_step=12), callback).fit(module, signs_loader(), signs_loader(1))
    packed = callback.quantized.net[2].weight
    assert len(torch.unique(module.net[2].weight)) <= 16
    assert len(torch.unique(packed.values)) <= 16 and packed.scale.numel() == 1
    assert_rounding_kept_what_was_learned(callback.report)


def test_pruned_clustered_and_rounded_weights_keep_their_zeros_and_clusters():
    callback = QuantizationAwareTraining("int8", start_step=4)
    before = [GradualPruning(ConstantSparsity(0.5, begin_step=4)), ClusterWeights(16, begin_step=8)]
    torch.manual_seed(0)
    module = Classifier(128)
    trainer_with(*before, callback).fit(module, signs_loader(), signs_loader(1))
    weight, packed = module.net[2].weight, callback.quantized.net[2].weight
    zeros = weight == 0
    assert zeros.float().mean() == 0.5 and len(weight.unique()) <= 16
    assert (packed.dequantize()[zeros] == 0).all() and len(packed.values.unique()) <= 16


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, partial(StochasticWeightAveraging, 1e-2, 1)])
def test_the_average_of_weights_that_trained_with_rounding_is_what_is_quantized(averaging):
    callback = QuantizationAwareTraining("int8")
    _, module = fit_signs(callback, None, averaging())
    averaged = copy.deepcopy(module)
    quantize(averaged, "int8")
    for (name, packed), expected in zip(callback.quantized.named_parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(packed.dequantize() if isinstance(packed, PackedWeight) else packed,
            expected.dequantize() if isinstance(expected, PackedWeight) else expected, msg=name)  # fmt: skip


def test_what_a_checkpointed_block_computes_again_is_not_observed_again():
    ranges = []
    for others in ([], [ActivationCheckpointing("full", modules=["net"])]):
        callback = QuantizationAwareTraining("int8_static")
        fit_signs(callback, None, *others)
        ranges.append(callback.state_dict()["ranges"])
    assert ranges[0] == ranges[1]


def test_two_of_them_keep_their_ranges_apart_in_a_checkpoint(tmp_path):
    body = QuantizationAwareTraining("int8_static", include="net.*", convert_on_fit_end=False)
    head = QuantizationAwareTraining("int8_static", include="head", convert_on_fit_end=False)
    trainer, _ = fit_signs(body, None, head)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert {name for key in (body.state_key, head.state_key) for name in saved[key]["ranges"]} == {
        "net.0", "net.2", "head",
    }  # fmt: skip
    assert saved[head.state_key]["ranges"].keys() == {"head"}


def test_ranges_seen_in_training_need_no_validation_and_two_optimizers_train_with_them():
    callback = QuantizationAwareTraining("int8_static", start_step=1)
    train(ZOO["gan"].build(), ZOO["gan"].loader(4), callbacks=[callback])
    inputs = {name: p.inputs for name, p in callback.quantized.named_parameters() if hasattr(p, "inputs")}
    assert len(inputs) > 1 and all(isinstance(seen, list) for seen in inputs.values())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_the_memory_of_rounding_in_each_forward_is_predicted(scheme):
    entry = ZOO["mlp"]

    def peak(measure):
        callback = QuantizationAwareTraining(scheme)
        return measure(entry.build(), entry.batch(), callbacks=[callback]).peak_bytes

    assert peak(predict_memory) == pytest.approx(peak(measure_memory), rel=0.02)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": "bf16"}, "Use QuantizeOnFitEnd"),
        ({"start_step": -1}, "start_step"),
        ({"freeze_observers_step": -2}, "freeze_observers_step"),
        ({"freeze_observers_step": 0}, "before anything is seen"),
        ({"convert_on_fit_end": False, "export_path": "net"}, "leaves nothing"),
        ({"convert_on_fit_end": False, "max_metric_drop": 0.1, "monitor": "x"}, "leaves nothing"),
        ({"scheme": "int9"}, "possible are"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, match):
    with pytest.raises(MisconfigurationException, match=match):
        QuantizationAwareTraining(**options)
