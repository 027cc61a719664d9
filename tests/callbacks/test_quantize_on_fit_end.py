"""QuantizeOnFitEnd under Lightning: the copy predicts, the original stays, the gate judges."""

import copy
import sys
import threading
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

from lightning_memopt import DataParallelStrategy, PruneOnFitEnd, QuantizeOnFitEnd, load_compressed
from lightning_memopt.callbacks.fit_end import validate_now
from lightning_memopt.compression.onnx import unpacked_copy
from lightning_memopt.compression.packed import PackedWeight, TorchaoWeight
from tests.callbacks.classifier import (
    Classifier,
    assert_rounding_kept_what_was_learned,
    fit_signs,
    signs_loader,
    trainer_with,
)
from tests.callbacks.learning import NotEvenStarted
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.zoo import ZOO


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "fp8"])
def test_torchao_holds_the_weights_of_a_copy_that_tests_predicts_and_loads(scheme, tmp_path):
    callback = QuantizeOnFitEnd(
        scheme, engine="torchao", max_metric_drop=0.05, monitor="val_accuracy", export_path=tmp_path / "net"
    )
    trainer, module = fit_signs(callback)
    quantized = callback.quantized
    assert type(quantized.net[2].weight.data) is TorchaoWeight and type(module.net[2].weight.data) is torch.Tensor
    assert callback.report.ratio < 0.34 and not callback.report.fallbacks
    assert_rounding_kept_what_was_learned(callback.report)
    predicted = torch.cat(trainer.predict(quantized, signs_loader(1)))
    loaded = torch.cat(trainer.predict(load_compressed(tmp_path / "net"), signs_loader(1)))
    assert torch.equal(predicted, loaded)


@pytest.mark.parametrize(
    ("scheme", "engine"),
    [(scheme, "memopt") for scheme in ("int8", "int8_static", "int4_weight_only", "nf4", "fp8", "bf16")]
    + [("int8_dynamic", "torchao")],
)
def test_a_checkpoint_of_what_was_packed_in_place_is_read_without_pickle_and_by_lightning(scheme, engine, tmp_path):
    trainer, module = fit_signs(QuantizeOnFitEnd(scheme, inplace=True, engine=engine), Classifier(128))
    trainer.save_checkpoint(tmp_path / "packed.ckpt")
    expected = module.eval()(x := torch.randn(4, 16))
    state = torch.load(tmp_path / "packed.ckpt", weights_only=True)["state_dict"]
    packed = Classifier(128).eval()
    packed.load_state_dict(state, assign=True)
    assert isinstance(packed.net[2].weight, PackedWeight)
    torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
    whole = Classifier.load_from_checkpoint(tmp_path / "packed.ckpt").eval()
    assert type(whole.net[2].weight.data) is torch.Tensor and (whole(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose kernels these are")
def test_a_scheme_that_the_engine_has_no_kernels_for_here_is_refused_before_the_first_step():
    callback = QuantizeOnFitEnd("int4_weight_only", engine="torchao")
    with pytest.raises(MisconfigurationException, match=r"QuantizeOnFitEnd: torchao cannot hold .* on cpu here"):
        fit_signs(callback, None, NotEvenStarted())


class Brittle(Classifier):
    """As a classifier, and each weight that is packed costs, whatever is rounded on whichever processor."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("score", -float(sum(isinstance(parameter, PackedWeight) for parameter in self.parameters())))


@pytest.mark.parametrize(
    "scheme", ["int8", "int8_dynamic", "int8_static", "int4_weight_only", "nf4", "fp8", "fp16", "bf16"]
)
def test_the_copy_tests_predicts_and_loads_and_the_original_is_as_plain_training_leaves_it(scheme, tmp_path):
    callback = QuantizeOnFitEnd(scheme, max_metric_drop=0.05, monitor="val_accuracy", export_path=tmp_path / "net")
    trainer, module = fit_signs(callback)
    assert [latency.batch_size for latency in callback.report.latency] == [1, 8]
    torch.manual_seed(0)
    plain = Classifier()
    trainer_with().fit(plain, signs_loader(), signs_loader(1))
    for key, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)

    quantized = callback.quantized
    assert isinstance(quantized.net[2].weight, PackedWeight) and not callback.refusal
    assert callback.report.ratio < (0.55 if scheme.endswith("16") else 0.32)
    assert_rounding_kept_what_was_learned(callback.report)
    tested = trainer.test(quantized, signs_loader(1), verbose=False)[0]
    assert tested["val_accuracy"] == pytest.approx(callback.report.metrics_after["val_accuracy"])
    predicted = torch.cat(trainer.predict(quantized, signs_loader(1)))
    loaded = torch.cat(trainer.predict(load_compressed(tmp_path / "net"), signs_loader(1)))
    assert torch.equal(predicted, loaded)
    assert not torch.equal(predicted, torch.cat(trainer.predict(module, signs_loader(1))))


def test_the_best_checkpoint_is_reloaded_and_tested_as_without_the_callback(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    callback = QuantizeOnFitEnd("int8", max_metric_drop=0.02)
    trainer, module = fit_signs(callback, None, checkpoint, enable_checkpointing=True)
    best = trainer.test(module, signs_loader(1), ckpt_path="best", verbose=False)[0]["val_accuracy"]
    assert best == pytest.approx(float(checkpoint.best_model_score))
    assert Classifier.load_from_checkpoint(checkpoint.best_model_path).net[2].weight.dtype is torch.float32
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, signs_loader(), signs_loader(1))  # and training goes on
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("name_it", [False, True])
def test_a_best_checkpoint_is_not_loaded_into_the_copy_that_predicted_last(name_it, tmp_path):
    callback = QuantizeOnFitEnd("int8")
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    trainer, module = fit_signs(callback, None, checkpoint, enable_checkpointing=True)
    with torch.no_grad():
        callback.quantized.head.bias.add_(1)
    wanted = trainer.predict(callback.quantized, signs_loader(1))[0]
    with pytest.raises(MisconfigurationException, match=r"QuantizeOnFitEnd: .* Name a module to load it into"):
        trainer.test(callback.quantized if name_it else None, signs_loader(1), ckpt_path="best", verbose=False)
    assert torch.equal(trainer.predict(callback.quantized, signs_loader(1))[0], wanted)
    trainer.test(module, signs_loader(1), ckpt_path="best", verbose=False)
    assert "on_load_checkpoint" not in vars(callback.quantized)


def test_validating_at_the_end_leaves_the_metrics_and_the_state_of_the_trainer_alone():
    seen = {}

    class Looks(pl.Callback):
        def on_fit_end(self, trainer, module):
            before = dict(trainer.callback_metrics)
            trained = {name: part.training for name, part in module.named_modules()}
            hooks = dict(vars(module))
            seen["metrics"] = validate_now(trainer, module)
            seen["callback"] = {name: float(value) for name, value in before.items()}
            assert dict(trainer.callback_metrics) == before
            assert {name: part.training for name, part in module.named_modules()} == trained
            assert vars(module).keys() == hooks.keys() and module.trainer is trainer
            assert trainer.state.fn == "fit"

    _, module = fit_signs(Looks())
    assert seen["metrics"]["val_accuracy"] == pytest.approx(seen["callback"]["val_accuracy"])
    assert seen["metrics"]["val_loss"] == pytest.approx(seen["callback"]["val_loss"])
    assert module.setups == ["fit"]


def test_a_result_that_loses_too_much_is_dropped_with_a_warning_and_the_original_kept(tmp_path):
    callback = QuantizeOnFitEnd(
        "int4_weight_only", max_metric_drop=0.5, monitor="score", export_path=tmp_path / "net"
    )
    with pytest.warns(UserWarning, match=r"score went from .* the result is dropped"):
        trainer, module = fit_signs(callback, Brittle())
    assert callback.quantized is None and "score" in callback.refusal
    assert not (tmp_path / "net").exists()
    kept = trainer.validate(module, signs_loader(1), verbose=False)[0]
    assert kept["score"] == 0 and kept["val_loss"] == pytest.approx(callback.report.metrics_before["val_loss"])


@pytest.mark.parametrize("other", [ModelCheckpoint, EarlyStopping])
def test_a_gate_that_takes_for_better_what_another_callback_takes_for_worse_is_refused_in_setup(other):
    callback = QuantizeOnFitEnd("int8", max_metric_drop=0.1, monitor="val_loss")
    with pytest.raises(MisconfigurationException, match=f"'val_loss' .* mode='max', and {other.__name__} moni"):
        fit_signs(callback, None, other(monitor="val_loss"), NotEvenStarted(), enable_checkpointing=True)


def test_a_loss_that_is_judged_as_if_more_of_it_were_better_is_warned_of_and_otherwise_nothing_is_said():
    with pytest.warns(UserWarning, match="'val_loss' is judged with mode='max'"):
        fit_signs(QuantizeOnFitEnd("int8", max_metric_drop=9.0, monitor="val_loss"), max_epochs=1)
    with warnings.catch_warnings(record=True) as said:
        fit_signs(QuantizeOnFitEnd("int8", max_metric_drop=9.0, monitor="val_loss", mode="min"), max_epochs=1)
        fit_signs(QuantizeOnFitEnd("int8", max_metric_drop=9.0, monitor="val_accuracy"), max_epochs=1)
    assert not [warning for warning in said if "judged with" in str(warning.message)]


def test_backing_off_packs_what_the_gate_bears_and_names_what_it_does_not(tmp_path):
    class Tender(Classifier):
        """As a classifier, and any rounding of the layer in the middle costs."""

        def validation_step(self, batch, batch_idx):
            self(batch[0])
            self.log("score", 1.0 - float(isinstance(self.net[2].weight, PackedWeight)))

    callback = QuantizeOnFitEnd(
        "int8_static", max_metric_drop=0.5, back_off=True, monitor="score", export_path=tmp_path / "net"
    )
    fit_signs(callback, Tender())
    assert not callback.refusal and callback.report.metrics_after["score"] == 1.0
    assert callback.report.skipped["net.2.weight"] == "left as it was, to meet max_metric_drop"
    loaded = load_compressed(tmp_path / "net", Tender())
    assert [isinstance(layer.weight, PackedWeight) for layer in (loaded.net[0], loaded.net[2], loaded.head)] == [
        True, False, True,
    ]  # fmt: skip
    low, high = loaded.head.weight.inputs
    assert low < high


def test_backing_off_to_nothing_is_a_refusal():
    callback = QuantizeOnFitEnd("int8", max_metric_drop=0.5, back_off=True, monitor="score")
    with pytest.warns(UserWarning, match="the result is dropped"):
        fit_signs(callback, Brittle())
    assert callback.quantized is None and callback.refusal


@pytest.mark.parametrize("scheme", ["int4_weight_only", "int8_static"])
def test_the_copy_of_a_module_that_is_compiled_as_a_whole_is_what_is_judged_and_predicts(scheme):
    callback, module = QuantizeOnFitEnd(scheme), Classifier()
    module.compile(backend="eager")
    fit_signs(callback, module, max_epochs=1)
    x, y = signs_loader(1).dataset.tensors
    found = callback.quantized(x)
    assert not torch.allclose(found, module(x))
    assert callback.report.metrics_after["val_loss"] == pytest.approx(float(F.cross_entropy(found, y)), rel=1e-4)
    unpacked, _ = unpacked_copy(callback.quantized)
    torch.testing.assert_close(unpacked(x), found, rtol=0.1, atol=0.1 if "static" in scheme else 1e-5)
    torch._dynamo.reset()


def test_in_place_the_module_itself_is_packed():
    callback = QuantizeOnFitEnd("int8", inplace=True)
    _, module = fit_signs(callback)
    assert callback.quantized is module and isinstance(module.head.weight, PackedWeight)


@pytest.mark.parametrize("name", ["metrics_mlp", "encoder", "gpt2", "llama", "cnn", "gan", "late_mlp", "lstm"])
def test_modules_of_the_zoo_are_quantized_after_training_as_they_are_without(name):
    entry = ZOO[name]
    callback = QuantizeOnFitEnd("int8")
    plain = train(entry.build(), entry.loader(batches=3), steps=3)
    run = train(entry.build(), entry.loader(batches=3), steps=3, callbacks=[callback])
    assert list(run.weights) == list(plain.weights)
    assert all(torch.equal(run.weights[key], plain.weights[key]) for key in plain.weights)
    assert callback.report.bytes_after < callback.report.bytes_before
    assert callback.quantized is not run.module


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "memopt_zero3"])
def test_two_ranks_quantize_the_same_whole_module_and_one_writes_it(strategy, tmp_path):
    from tests.callbacks.quantize_on_two_ranks import quantize

    first, second = run_on_ranks(quantize, 2, strategy, tmp_path, deadline_seconds=180)
    assert first == second and first[1] > 0.75  # a guess has 0.5
    loaded = load_compressed(tmp_path / "net").net[2].weight
    assert [*loaded.dequantize().flatten().tolist(), loaded.inputs] == first[0]
    torch.testing.assert_close(torch.tensor(first[0][:-1]), torch.tensor(first[2]), rtol=0, atol=0.02)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "make",
    [
        lambda: "ddp_fork",
        lambda: DataParallelStrategy(shard="none", start_method="fork"),
        pytest.param(lambda: DataParallelStrategy(shard="parameters", start_method="fork"), marks=pytest.mark.slow),
        pytest.param(lambda: "ddp_spawn", marks=pytest.mark.slow),
    ],
)
def test_the_process_that_launched_others_gets_the_quantized_module_back_and_they_validate_it(make, tmp_path):
    callback = QuantizeOnFitEnd("int8_static", export_path=tmp_path / "net")
    trainer, module = fit_signs(callback, None, devices=2, strategy=make(), max_epochs=1)
    written, x = load_compressed(tmp_path / "net"), torch.randn(4, 16)
    assert isinstance(callback.quantized.net[2].weight, PackedWeight)
    assert torch.equal(callback.quantized(x), written(x)) and not torch.equal(module.eval()(x), written(x))
    trainer.validate(callback.quantized, signs_loader(1), verbose=False)
    validated = float(trainer.callback_metrics["val_accuracy"])
    assert validated == pytest.approx(callback.report.metrics_after["val_accuracy"])


@pytest.mark.distributed
@pytest.mark.parametrize("max_drop", [0.5, 10.0])
def test_the_process_that_launched_others_is_told_why_a_result_was_refused(max_drop):
    callback = QuantizeOnFitEnd("int4_weight_only", max_metric_drop=max_drop, monitor="score")
    fit_signs(callback, Brittle(), devices=2, strategy="ddp_fork", max_epochs=1)
    assert bool(callback.refusal) == (callback.quantized is None) == (max_drop == 0.5)


@pytest.mark.distributed
def test_packing_the_module_itself_is_refused_where_weights_travel_back_to_a_plain_one():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"QuantizeOnFitEnd: .*inplace=True packs"):
        fit_signs(QuantizeOnFitEnd(inplace=True), None, devices=2, strategy="ddp_fork")


def test_without_bitsandbytes_the_extra_to_install_is_named_when_nf4_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"bitsandbytes, which is not installed; .*lightning-memopt\[quantize\]"):
        QuantizeOnFitEnd("nf4")


class NoValidation(Classifier):
    validation_step = pl.LightningModule.validation_step


class Counts(NoValidation):
    """Knows in how many batches it was trained."""

    batches = 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return super().training_step(batch, batch_idx)


class HoldsALock(Classifier):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class StepsItself(NoValidation):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "options"), [(Counts, {}), (Classifier, {"limit_val_batches": 0}), (Classifier, {})]
)
def test_calibration_needs_no_validation(module, options):
    callback, plain = QuantizeOnFitEnd("int8_static", calibration_batches=2), module()
    trained = copy.deepcopy(plain)
    trainer, _ = fit_signs(callback, trained, **options)
    fit_signs(pl.Callback(), plain, **options)
    assert all(torch.equal(one, two) for one, two in zip(trained.parameters(), plain.parameters(), strict=True))
    assert trainer.callback_metrics.keys() == plain.trainer.callback_metrics.keys()
    assert getattr(trained, "batches", None) == getattr(plain, "batches", None)
    assert not callback.report.fallbacks  # which would name each layer that calibration did not see
    assert bool(callback.report.metrics_after) == (module is Classifier and not options)
    assert "validation_step" not in vars(trained) and "validation_step" not in vars(callback.quantized)


@pytest.mark.parametrize(
    ("make", "module", "options", "match"),
    [
        (lambda: QuantizeOnFitEnd("int8", max_metric_drop=0.1), Classifier, {}, "name it with monitor="),
        (lambda: QuantizeOnFitEnd("int8"), HoldsALock, {}, "HoldsALock cannot be copied"),
        (
            lambda: QuantizeOnFitEnd("int8_static"),
            StepsItself,
            {},
            "StepsItself has not, and its training_step",
        ),
        (lambda: QuantizeOnFitEnd("int8", include="nothing*"), Classifier, {}, "nothing"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_step(make, module, options, match):
    stepped = []

    class Steps(pl.Callback):
        def on_train_batch_start(self, *_):
            stepped.append(1)

    with pytest.raises(MisconfigurationException, match=f"QuantizeOnFitEnd: .*{match}"):
        fit_signs(make(), module(), Steps(), **options)
    assert not stepped


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": "int2"}, "possible are"),
        ({"back_off": True}, "without max_metric_drop"),
        ({"calibration_batches": 0}, "sees no data"),
        ({"calibration_batches": "4"}, "sees no data"),
        ({"max_metric_drop": "0.1", "monitor": "x"}, "at least 0"),
        ({"max_metric_drop": -1.0}, "at least 0"),
        ({"max_metric_drop": 0.1, "inplace": True}, "cannot be refused"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_when_they_are_given(options, match):
    with pytest.raises(MisconfigurationException, match=match):
        QuantizeOnFitEnd(**options)


class _Keeping(Classifier):
    """Keeps what it computed, with its graph."""

    def training_step(self, batch, batch_idx):
        self.last_logits = self(batch[0])
        self.losses = [F.cross_entropy(self.last_logits, batch[1])]
        return self.losses[0]


@pytest.mark.parametrize(
    "callback", [QuantizeOnFitEnd("int8"), PruneOnFitEnd(0.5, max_metric_drop=1.0, monitor="val_accuracy")]
)
def test_a_module_that_keeps_its_last_logits_is_copied(callback):
    _, module = fit_signs(callback, _Keeping(), max_epochs=1)
    assert callback.report.metrics_after and module.last_logits.grad_fn is not None


def test_a_type_that_no_file_holds_is_refused_before_the_first_step(tmp_path):
    module = Classifier()
    module.register_buffer("phases", torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(MisconfigurationException, match=r"`phases` holds torch\.complex128"):
        fit_signs(QuantizeOnFitEnd("int8", export_path=tmp_path / "net"), module, NotEvenStarted())


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: {"x": x}])
def test_an_example_of_several_arguments_or_of_named_ones_is_timed_too(wrap):
    module, callback = Classifier(), QuantizeOnFitEnd("int8")
    module.example_input_array = wrap(module.example_input_array)
    fit_signs(callback, module, max_epochs=1)
    assert [one.batch_size for one in callback.report.latency] == [1, 8]


def test_a_latency_that_cannot_be_measured_is_no_reason_to_lose_the_result():
    module = Classifier()
    module.example_input_array = torch.randn(16)  # of one sample, without a dimension for more
    callback = QuantizeOnFitEnd("int8")
    with pytest.warns(UserWarning, match="No latency was measured"):
        fit_signs(callback, module)
    assert callback.quantized is not None and callback.report.latency == ()
