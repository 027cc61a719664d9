"""QuantizeOnFitEnd("int8_static", engine="torchao"): graphs of integers under Lightning."""

import platform
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_memopt import QuantizeOnFitEnd, load_compressed
from lightning_memopt.compression.exported.module import ExportedModule
from lightning_memopt.compression.packed import PackedWeight
from tests.callbacks.classifier import (
    Classifier,
    assert_rounding_kept_what_was_learned,
    fit_signs,
    signs_loader,
    trainer_with,
)
from tests.callbacks.learning import NotEvenStarted
from tests.callbacks.test_quantize_on_fit_end import NoValidation
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.zoo import ZOO


def by_export(**options) -> QuantizeOnFitEnd:
    return QuantizeOnFitEnd("int8_static", engine="torchao", **options)


def test_the_copy_tests_predicts_and_loads_and_the_original_is_as_plain_training_leaves_it(tmp_path):
    callback = by_export(max_metric_drop=0.05, monitor="val_accuracy", export_path=tmp_path / "net")
    trainer, module = fit_signs(callback)
    torch.manual_seed(0)
    plain = Classifier()
    trainer_with().fit(plain, signs_loader(), signs_loader(1))
    for key, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)

    quantized = callback.quantized
    assert isinstance(quantized.net, ExportedModule) and isinstance(quantized.head, ExportedModule)
    assert not callback.refusal and not callback.report.fallbacks and callback.report.ratio < 0.4
    assert callback.report.skipped_bytes == {"net.0.bias": 256, "net.2.bias": 256, "head.bias": 8}
    assert_rounding_kept_what_was_learned(callback.report)
    tested = trainer.test(quantized, signs_loader(1), verbose=False)[0]
    assert tested["val_accuracy"] == pytest.approx(callback.report.metrics_after["val_accuracy"])
    predicted = torch.cat(trainer.predict(quantized, signs_loader(1)))
    loaded = load_compressed(tmp_path / "net")
    assert torch.equal(predicted, torch.cat(trainer.predict(loaded, signs_loader(1))))
    assert torch.equal(loaded(torch.ones(5, 16)), quantized(torch.ones(5, 16)))  # a batch of another size
    plainly = torch.cat(trainer.predict(module, signs_loader(1)))
    assert 0 < (predicted - plainly).norm() < 0.05 * plainly.norm()


def test_a_result_that_loses_too_much_is_dropped_with_a_warning():
    class Brittle(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("score", -float(isinstance(self.net, ExportedModule)))

    callback = by_export(max_metric_drop=0.5, monitor="score")
    with pytest.warns(UserWarning, match=r"score went from .* the result is dropped"):
        fit_signs(callback, Brittle(), max_epochs=1)
    assert callback.quantized is None and callback.report.metrics_after["score"] == -1


def test_a_best_checkpoint_is_not_loaded_into_the_copy(tmp_path):
    callback = by_export()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    trainer, module = fit_signs(callback, None, checkpoint, enable_checkpointing=True, max_epochs=1)
    trainer.predict(callback.quantized, signs_loader(1))
    with pytest.raises(MisconfigurationException, match=r"QuantizeOnFitEnd: .* Name a module to load it into"):
        trainer.test(None, signs_loader(1), ckpt_path="best", verbose=False)
    trainer.test(module, signs_loader(1), ckpt_path="best", verbose=False)


def test_calibration_needs_no_validation():
    callback = by_export(calibration_batches=2)
    fit_signs(callback, NoValidation(), max_epochs=1)
    assert isinstance(callback.quantized.net, ExportedModule) and not callback.report.fallbacks


def test_data_that_can_be_read_only_once_leaves_packed_weights_that_are_named():
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.batches = iter(list(signs_loader().dataset)[:64])

        def __iter__(self):
            return self.batches

    callback = by_export()
    trainer_with(callback, max_epochs=1).fit(
        Classifier(), torch.utils.data.DataLoader(Once(), batch_size=32), signs_loader(1)
    )
    assert isinstance(callback.quantized.net[0].weight, PackedWeight)
    assert "calibration saw no call" in callback.report.fallbacks["net.0.weight"]


def test_a_validation_that_asks_of_a_graph_what_it_has_not_leaves_packed_weights_that_are_named():
    class AsksAtLast(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if batch[1].shape[0] == 7:
                self.log("depth", float(len(self.net)))

    x, y = signs_loader(1).dataset.tensors
    last = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:39], y[:39]), batch_size=32)
    callback = by_export()
    trainer_with(callback, max_epochs=1).fit(AsksAtLast(), signs_loader(), last)
    assert isinstance(callback.quantized.net[0].weight, PackedWeight)
    assert "what was exported does not run as the module does" in callback.report.fallbacks["net.0.weight"]
    assert callback.report.metrics_after["depth"] == 4


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_half_precision_is_exported_or_named(precision):
    callback = by_export()
    trainer, _ = fit_signs(callback, None, max_epochs=1, precision=precision)
    predicted = torch.cat(trainer.predict(callback.quantized, signs_loader(1)))
    assert predicted.isfinite().all() and callback.report.ratio < 1
    exported = [name for name, part in callback.quantized.named_modules() if isinstance(part, ExportedModule)]
    assert exported == ["net", "head"] or len(callback.report.fallbacks) == 3


@pytest.mark.parametrize(
    "name", ["late_mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("metrics_mlp", "cnn", "encoder"))]
)
def test_modules_of_the_zoo_are_quantized_after_training_as_they_are_without(name, tmp_path):
    entry = ZOO[name]
    callback = by_export(export_path=tmp_path / "net")
    plain = train(entry.build(), entry.loader(batches=3), steps=3)
    run = train(entry.build(), entry.loader(batches=3), steps=3, callbacks=[callback])
    assert list(run.weights) == list(plain.weights)
    assert all(torch.equal(run.weights[key], plain.weights[key]) for key in plain.weights)
    assert callback.report.bytes_after < callback.report.bytes_before
    assert any(isinstance(part, ExportedModule) for part in callback.quantized.modules())
    loaded = load_compressed(tmp_path / "net", entry.build(seed=1))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in callback.quantized.state_dict().items())


def test_two_optimizers_that_are_stepped_by_hand_and_two_networks():
    class Pair(Classifier):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 16))

        def training_step(self, batch, batch_idx):
            for optimizer, part in zip(self.optimizers(), (self, self.critic), strict=True):
                optimizer.zero_grad()
                logits = Classifier.forward(self, batch[0])
                loss = F.cross_entropy(logits, batch[1]) if part is self else F.mse_loss(part(logits), batch[0])
                self.manual_backward(loss)
                optimizer.step()

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("cycle", F.mse_loss(self.critic(self(batch[0])), batch[0]))

        def configure_optimizers(self):
            own = [*self.net.parameters(), *self.head.parameters()]
            return [torch.optim.Adam(own, lr=1e-2), torch.optim.Adam(self.critic.parameters(), lr=1e-2)]

    callback = by_export()
    fit_signs(callback, Pair(), max_epochs=1)
    exported = [name for name, part in callback.quantized.named_modules() if isinstance(part, ExportedModule)]
    assert exported == ["net", "head", "critic"]
    assert callback.report.metrics_after["cycle"] == pytest.approx(callback.report.metrics_before["cycle"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": "int8_static", "engine": "torchao", "inplace": True}, "inplace=True needs modules that stay"),
        (
            {"scheme": "int8_static", "engine": "torchao", "back_off": True, "max_metric_drop": 0.1},
            "back_off=True needs modules that stay",
        ),
    ],
)
def test_options_that_it_has_not_are_refused(options, match):
    with pytest.raises(MisconfigurationException, match=f"QuantizeOnFitEnd: {match}"):
        QuantizeOnFitEnd(**options)


def test_without_torchao_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    with pytest.raises(ModuleNotFoundError, match=r"torchao.* not installed: pip install 'lightning-memopt\[quan"):
        by_export()


def test_other_processors_are_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(
        MisconfigurationException, match=r"int8_static.* is unsupported on a processor of kind 'aarch"
    ):
        fit_signs(by_export(), None, NotEvenStarted())


@pytest.mark.distributed
def test_two_ranks_agree_on_graphs_and_the_process_that_forked_them_is_told_that_no_pickle_holds_them(tmp_path):
    from tests.callbacks.quantize_on_two_ranks import quantize_by_export

    first, second = run_on_ranks(quantize_by_export, 2, tmp_path, deadline_seconds=180)
    assert first == second
    assert load_compressed(tmp_path / "net")(torch.ones(3, 16)).flatten().tolist() == first

    callback = by_export(export_path=tmp_path / "forked")
    fit_signs(callback, None, devices=2, strategy="ddp_fork", max_epochs=1)
    with pytest.raises(RuntimeError, match=r"exported graph, which pickle does not hold.* read that with load_compr"):
        _ = callback.quantized
    assert isinstance(load_compressed(tmp_path / "forked").net, ExportedModule)
