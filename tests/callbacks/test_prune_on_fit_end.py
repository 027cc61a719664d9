"""PruneOnFitEnd under Lightning: every module of the zoo, strategies, the report, refusals before the first step."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt import (
    ClusterWeights,
    ConstantSparsity,
    GradualPruning,
    PruneOnFitEnd,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
)
from lightning_memopt.compression.codecs import encode
from lightning_memopt.compression.container import load_compressed
from lightning_memopt.compression.masks import find_sparsity, prune_weights
from lightning_memopt.compression.selection import select_weights
from lightning_memopt.compression.sizes import plain_values
from tests.callbacks.learning import Learning, NotEvenStarted, learn
from tests.distributed import run_on_ranks
from tests.parity import quiet_trainer, train
from tests.zoo import ZOO, cases


@pytest.mark.parametrize("name", cases())
def test_training_is_that_of_the_plain_trainer_and_then_the_smallest_weights_are_zero(name):
    entry = ZOO[name]
    plain = train(entry.build(), entry.loader(3), steps=3)
    pruning = PruneOnFitEnd(0.5, scope="global")
    run = train(entry.build(), entry.loader(3), steps=3, callbacks=[pruning])
    assert run.losses == plain.losses and list(run.weights) == list(plain.weights)
    chosen = {weight.name for weight in select_weights(run.module).weights}
    kept = torch.cat([plain.weights[key][run.weights[key] != 0] for key in sorted(chosen)]).abs()
    gone = torch.cat([plain.weights[key][run.weights[key] == 0] for key in sorted(chosen)]).abs()
    assert gone.max() < kept.min() and abs(len(gone) - len(kept)) <= 1
    for key in (
        plain.weights.keys() - chosen - {other for w in select_weights(run.module).weights for other in w.tied}
    ):
        assert torch.equal(run.weights[key], plain.weights[key])


def test_the_report_has_the_true_share_over_what_was_to_be_pruned_and_over_all_and_the_bytes_of_a_sparse_export():
    entry, pruning = ZOO["gpt2"], PruneOnFitEnd(0.8)
    run = train(entry.build(), entry.loader(2), steps=2, callbacks=[pruning])
    report = pruning.report
    assert report.eligible_sparsity == pytest.approx(0.8, abs=1e-3) and 0.5 < report.sparsity < 0.8
    assert report.bytes_after == report.bytes_before
    weight = run.module.model.transformer.h[0].mlp.c_fc.weight
    assert encode(weight).nbytes < 0.25 * weight.nbytes
    assert "on request only" in report.skipped["model.transformer.wte.weight"]


@pytest.mark.parametrize(
    "make", [lambda: PruneOnFitEnd(0.5), lambda: GradualPruning(ConstantSparsity(0.5)), lambda: PruneOnFitEnd(0.9)]
)
def test_zeros_that_were_there_before_count_in_what_the_report_says_of_the_weights_to_be_pruned(make):
    class Frozen(type(ZOO["mlp"].build())):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, pruning = Frozen(0.0), make()
    prune_weights(module, 0.8)
    train(module, ZOO["mlp"].loader(1), callbacks=[pruning])
    wanted = 0.9 if getattr(pruning, "amount", 0.5) == 0.9 else 0.8
    assert pruning.report.eligible_sparsity == pytest.approx(wanted, abs=1e-3)
    assert pruning.report.sparsity < pruning.report.eligible_sparsity


@pytest.mark.parametrize(("amount", "kept", "length"), [(0.5, 2, 4), (0.75, 1, 4), (0.375, 5, 8)])
def test_n_of_m_takes_its_numbers_from_the_amount(amount, kept, length):
    entry = ZOO["mlp"]
    run = train(entry.build(), entry.loader(1), steps=1, callbacks=[PruneOnFitEnd(amount, "n:m")])
    groups = run.module.net[3].weight.unflatten(-1, (-1, length))
    assert ((groups != 0).sum(-1) == kept).all()


def test_fitting_again_to_the_same_amount_does_not_prune_more():
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    for _ in range(3):
        train(module, entry.loader(2), steps=2, callbacks=[PruneOnFitEnd(0.5)])
        assert find_sparsity(module) == {"net.0.weight": 0.5, "net.3.weight": 0.5, "net.5.weight": 0.5}


def test_a_checkpoint_from_before_is_read_back_for_a_test_of_the_best(tmp_path):
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    module.test_step = module.validation_step
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[PruneOnFitEnd(0.5), pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")],
    )  # fmt: skip
    trainer.fit(module, entry.loader(4), entry.loader(1))
    assert find_sparsity(module)
    assert trainer.test(module, entry.loader(1), ckpt_path="best", verbose=False)
    assert not find_sparsity(module)


def test_a_weight_of_which_nothing_is_left_is_said():
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    with torch.no_grad():
        module.net[3].weight.mul_(1e-6)
    pruning = PruneOnFitEnd(0.8, scope="global")
    with pytest.warns(UserWarning, match=r"All of 'net.3.weight' is zero now"):
        train(module, entry.loader(1), steps=1, callbacks=[pruning], max_steps=0)


def _train_on_two(strategy: str) -> dict[str, list[float]]:
    entry = ZOO["encoder"]
    pruning = PruneOnFitEnd(0.5, scope="global")
    options = {"callbacks": [pruning], "devices": 2, "strategy": strategy}
    run = train(entry.build(), entry.loader(2, batch_size=8), steps=2, **options)
    assert pruning.report.eligible_sparsity == pytest.approx(0.5, abs=1e-3)
    return {name: weight.flatten().tolist() for name, weight in run.weights.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        "memopt_zero3",
        "memopt_pp",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("memopt_ddp", marks=pytest.mark.slow),
        pytest.param("memopt_tp", marks=pytest.mark.slow),
    ],
)
def test_under_every_strategy_each_rank_has_the_whole_module_pruned_alike(strategy):
    first, second = run_on_ranks(_train_on_two, 2, strategy, deadline_seconds=180)
    assert first == second
    prunable = [weight.name for weight in select_weights(ZOO["encoder"].build()).weights]
    values = torch.tensor([value for name in prunable for value in first[name]])
    assert float((values == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_the_report_has_the_metrics_of_the_modules_own_validation_before_and_after():
    pruning = PruneOnFitEnd(0.9)
    trainer = learn(pruning)
    report = pruning.report
    assert report.metrics_before["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert report.metrics_after["val_loss"] > report.metrics_before["val_loss"] + 0.05
    checked = trainer.validate(trainer.lightning_module, ZOO["mlp"].loader(4), verbose=False)
    assert checked[0]["val_loss"] == pytest.approx(report.metrics_after["val_loss"])


@pytest.mark.parametrize(("allowed", "is_refused"), [(1e-3, True), (10.0, False)])
def test_a_metric_that_would_become_worse_than_allowed_leaves_the_module_as_it_was(tmp_path, allowed, is_refused):
    pruning = PruneOnFitEnd(
        0.9, max_metric_drop=allowed, monitor="val_loss", mode="min", export_path=tmp_path / "small"
    )
    if is_refused:
        with pytest.warns(UserWarning, match=r"val_loss went from .* so the module is left as it is"):
            trainer = learn(pruning)
    else:
        trainer = learn(pruning)
    assert bool(pruning.refusal) == is_refused
    assert bool(find_sparsity(trainer.lightning_module)) != is_refused
    assert (tmp_path / "small").exists() != is_refused
    assert pruning.report.metrics_after["val_loss"] > pruning.report.metrics_before["val_loss"]


def test_what_is_exported_is_small_and_is_the_pruned_module(tmp_path):
    pruning = PruneOnFitEnd(0.8, export_path=tmp_path / "small")
    module = ZOO["mlp"].build()
    module.net = torch.nn.Sequential(torch.nn.Linear(16, 512), torch.nn.ReLU(), torch.nn.Linear(512, 4))
    train(module, ZOO["mlp"].loader(2), steps=2, callbacks=[pruning])
    skeleton = ZOO["mlp"].build()
    skeleton.net = torch.nn.Sequential(torch.nn.Linear(16, 512), torch.nn.ReLU(), torch.nn.Linear(512, 4))
    loaded = load_compressed(tmp_path / "small", skeleton)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    assert pruning.report.disk_bytes_after == sum(file.stat().st_size for file in (tmp_path / "small").iterdir())


@pytest.mark.parametrize("scheme", ["int8_weight_only", "nf4", "bf16"])
def test_what_is_pruned_is_still_zero_when_it_is_quantized_after_that(scheme, tmp_path):
    entry, quantizing = ZOO["gpt2"], QuantizeOnFitEnd(scheme, export_path=tmp_path / "both")
    run = train(entry.build(), entry.loader(1), steps=1, callbacks=[PruneOnFitEnd(0.5), quantizing])
    for name, share in find_sparsity(run.module).items():
        if share == pytest.approx(0.5, abs=1e-3):
            zeros = run.module.get_parameter(name) == 0
            assert (plain_values(quantizing.quantized.get_parameter(name))[zeros] == 0).all()
    assert quantizing.report.sparsity >= 0.4


@pytest.mark.parametrize("first", [True, False])
def test_gradual_pruning_beside_quantization_of_the_module_itself_works_in_either_order(first):
    entry, callbacks = ZOO["gpt2"], [GradualPruning(ConstantSparsity(0.5)), QuantizeOnFitEnd("int8", inplace=True)]
    run = train(entry.build(), entry.loader(1), steps=1, callbacks=callbacks if first else callbacks[::-1])
    weight = plain_values(run.module.model.transformer.h[0].mlp.c_fc.weight)
    assert float((weight == 0).float().mean()) >= 0.5


def test_a_gate_without_validation_is_refused_in_setup():
    pruning = PruneOnFitEnd(0.5, max_metric_drop=0.1, monitor="val_loss")
    with pytest.raises(MisconfigurationException, match="without validation data"):
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(1), steps=1, callbacks=[NotEvenStarted(), pruning])


def test_a_gate_on_a_metric_that_is_not_logged_is_refused_before_the_first_step():
    pruning = PruneOnFitEnd(0.5, max_metric_drop=0.1, monitor="val_accuracy")
    with pytest.raises(
        MisconfigurationException, match=r"PruneOnFitEnd: monitor='val_accuracy' is not logged .* logs \['val_loss'\]"
    ):
        learn(_Never(), pruning)


def test_the_same_callback_beside_a_validation_of_its_own_does_not_judge():
    trainer = quiet_trainer(1, PruneOnFitEnd(0.5, max_metric_drop=0.1))
    assert trainer.validate(ZOO["mlp"].build(), ZOO["mlp"].loader(1), verbose=False)


class _Talking(type(ZOO["mlp"].build())):
    """Uses in its validation what users use there: the logger's own methods, and the data module."""

    def validation_step(self, batch, batch_idx):
        self.logger.experiment.add_histogram("weights", self.net[0].weight)
        self.log("classes", float(self.trainer.datamodule.classes))
        super().validation_step(batch, batch_idx)


class _Data(pl.LightningDataModule):
    classes = 4

    def __init__(self):
        super().__init__()
        self.setups = []

    def setup(self, stage):
        self.setups.append(stage)

    def train_dataloader(self):
        return ZOO["mlp"].loader(2)

    def val_dataloader(self):
        return ZOO["mlp"].loader(3)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 0.5, batch[1]


def test_validation_at_the_end_is_that_of_the_run_with_its_data_module_and_a_logger(tmp_path):
    class Logger(pl.loggers.logger.DummyLogger):
        """Takes all that a module says."""

    pruning, data, module = PruneOnFitEnd(0.5), _Data(), _Talking(0.0)
    trainer = quiet_trainer(2, pruning, logger=Logger())
    trainer.fit(module, datamodule=data)
    assert pruning.report.metrics_before["classes"] == 4
    assert pruning.report.metrics_before["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert data.setups == ["fit"] and data.trainer is trainer and module.trainer is trainer


def test_with_validation_switched_off_it_prunes_all_the_same():
    trainer = quiet_trainer(1, pruning := PruneOnFitEnd(0.5), limit_val_batches=0)
    trainer.fit(ZOO["mlp"].build(), ZOO["mlp"].loader(1), ZOO["mlp"].loader(1))
    assert pruning.report.metrics_before == {} and find_sparsity(trainer.lightning_module)


def test_a_module_within_a_module_has_its_trainer_back_after_the_gate():
    module = Learning(0.0)
    module.inner = ZOO["mlp"].build()
    pruning = PruneOnFitEnd(0.5, max_metric_drop=10.0, monitor="val_loss", mode="min")
    trainer = learn(pruning, module=module, epochs=1)
    assert module.inner.trainer is trainer and find_sparsity(module)


@pytest.mark.parametrize("make", [lambda: PruneOnFitEnd(0.5), lambda: ClusterWeights(4)])
def test_behind_quantization_of_the_module_itself_it_is_refused_in_setup(make):
    callbacks = [NotEvenStarted(), QuantizeOnFitEnd("int8", inplace=True), make()]
    with pytest.raises(MisconfigurationException, match=r"QuantizeOnFitEnd\(inplace=True\) comes before it"):
        train(ZOO["gpt2"].build(), ZOO["gpt2"].loader(1), callbacks=callbacks)


@pytest.mark.parametrize("make", [lambda: PruneOnFitEnd(0.5), lambda: ClusterWeights(4)])
@pytest.mark.parametrize("quantizing", [QuantizeOnFitEnd, QuantizationAwareTraining])
def test_behind_quantization_of_a_copy_that_copy_is_said_to_be_without_it(make, quantizing):
    entry = ZOO["mlp"]
    with pytest.warns(UserWarning, match=f"comes after {quantizing.__name__} in the list of callbacks"):
        train(entry.build(), entry.loader(1), callbacks=[quantizing("int8"), make()])
    others = [[make(), quantizing("int8")], [quantizing("int8"), QuantizeOnFitEnd("nf4")]]
    others.append([QuantizationAwareTraining("int8", convert_on_fit_end=False), make()])
    with warnings.catch_warnings(record=True) as said:
        for callbacks in others:
            train(entry.build(), entry.loader(1), callbacks=callbacks)
    assert not [warning for warning in said if "comes after" in str(warning.message)]


@pytest.mark.parametrize(
    "make", [lambda: GradualPruning(ConstantSparsity(0.5)), lambda: ClusterWeights(4, begin_step=1)]
)
def test_what_weights_kept_while_they_trained_is_not_laid_over_a_module_made_smaller_since(make):
    pytest.importorskip("torch_pruning")
    runs = []
    for last in (True, False):
        callbacks = [PruneOnFitEnd(0.5, "structured"), make()]
        callbacks = callbacks if last else callbacks[::-1]
        runs.append(train(ZOO["mlp"].build(), ZOO["mlp"].loader(3), steps=3, callbacks=callbacks).weights)
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_a_gate_on_a_metric_of_one_of_several_loaders():
    class Several(type(ZOO["mlp"].build())):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    pruning = PruneOnFitEnd(0.5, max_metric_drop=10.0, monitor="val_loss/dataloader_idx_1", mode="min")
    loaders = [ZOO["mlp"].loader(1), ZOO["mlp"].loader(2)]
    quiet_trainer(1, pruning).fit(Several(0.0), ZOO["mlp"].loader(1), loaders)
    assert set(pruning.report.metrics_after) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}


class _BuiltInSetup(type(ZOO["mlp"].build())):
    def __init__(self):
        super().__init__(0.0)
        del self.net

    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = ZOO["mlp"].build().net


@pytest.mark.parametrize(
    "make",
    [
        lambda: PruneOnFitEnd(0.5, include="net.3"),
        lambda: GradualPruning(ConstantSparsity(0.5), include="net.3"),
        lambda: ClusterWeights(4, include="net.3"),
    ],
)
def test_layers_that_the_modules_own_setup_makes_are_waited_for(make):
    run = train(_BuiltInSetup(), ZOO["mlp"].loader(1), steps=1, callbacks=[make()])
    assert len(run.module.net[3].weight.unique()) <= run.module.net[3].weight.numel() // 2 + 1


@pytest.mark.parametrize("make", [lambda path: PruneOnFitEnd(0.5, export_path=path),
                                  lambda path: QuantizeOnFitEnd("int8", export_path=path)])  # fmt: skip
def test_a_fast_dev_run_does_not_take_the_place_of_what_a_training_exported(make, tmp_path):
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(2), steps=2, callbacks=[make(tmp_path / "net")])
    manifest = tmp_path / "net" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    again = make(tmp_path / "net")
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(2), callbacks=[again], fast_dev_run=True)
    assert again.report is not None and manifest.stat().st_mtime_ns == written


def test_a_folder_that_cannot_be_written_is_refused_in_setup(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for path, reason in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "is a file"),
        (tmp_path / "other", "holds something else"),
        *([("/proc/net-of-mine", "cannot be made")] if Path("/proc").is_dir() else []),
    ):
        pruning = PruneOnFitEnd(0.5, export_path=path)
        with pytest.raises(MisconfigurationException, match=f"PruneOnFitEnd: .*{reason}"):
            train(ZOO["mlp"].build(), ZOO["mlp"].loader(1), callbacks=[NotEvenStarted(), pruning])


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_the_process_that_launched_others_gets_the_pruned_weights_back(strategy):
    entry = ZOO["mlp"]
    callbacks = [
        GradualPruning(ConstantSparsity(0.25, begin_step=1), include="net.0"),
        PruneOnFitEnd(0.5, include="net.3"),
    ]
    run = train(entry.build(), entry.loader(2), steps=2, callbacks=callbacks, devices=2, strategy=strategy)
    assert find_sparsity(run.module) == {"net.0.weight": 0.25, "net.3.weight": 0.5}
    assert callbacks[0].sparsity == callbacks[0].report.eligible_sparsity == 0.25
    assert callbacks[1].report.eligible_sparsity == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneOnFitEnd(0), "amount=0 is no share of the weights"),
        (lambda: PruneOnFitEnd(1.0), "amount=1.0 is no share"),
        (lambda: PruneOnFitEnd(0.3, "n:m"), "amount=0.3 is no number of quarters or eighths"),
        (lambda: PruneOnFitEnd(0.5, "n:m", pattern="1:4"), "0.5 is not that of 1:4"),
        (lambda: PruneOnFitEnd(0.5, "structured", pattern="2:4"), "pattern='2:4' says what becomes zero"),
        (lambda: PruneOnFitEnd(0.5, "saliency"), "needs gradients, which are gone"),
        (lambda: PruneOnFitEnd(0.5, "l2"), "method='l2' is none of 'magnitude', 'random', 'n:m', 'structured'"),
        (lambda: PruneOnFitEnd(0.5, pattern="square"), "pattern='square' is none of"),
    ],
)
def test_arguments_that_cannot_be_are_refused_when_they_are_given(make, message):
    with pytest.raises(MisconfigurationException, match=f"PruneOnFitEnd: .*{message}"):
        make()


@pytest.mark.parametrize("name", ["mlp", "late_mlp"])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"include": "body.*"}, "include='body.*' matches no"), ({"pattern": "1x3"}, "blocks of 1 x 3 do not divide")],
)
def test_what_cannot_be_pruned_is_refused_before_the_first_step_and_not_at_the_end(name, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        train(ZOO[name].build(), ZOO[name].loader(1), steps=1, callbacks=[_Never(), PruneOnFitEnd(0.5, **options)])


class _Never(pl.Callback):
    def on_train_batch_start(self, *args):
        raise AssertionError("training has begun")
