"""What users see of a pipeline beside weights: logs, callbacks, metrics, outputs, on every rank as on one device."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, F1Score, MeanMetric, MetricCollection, PearsonCorrCoef

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.zoo import ZOO


class Classifier(pl.LightningModule):
    """Logs values and metrics, returns dicts, plateaus, validates, tests and predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        self.train_accuracy = Accuracy("multiclass", num_classes=4)
        self.val_accuracy = Accuracy("multiclass", num_classes=4)
        self.mean = MeanMetric()
        self.computed: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.train_accuracy(logits, y)
        self.log("accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", logits.max(), reduce_fx="max")
        return {"loss": loss, "logits": logits.detach(), "label": y}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.val_accuracy(logits, y)
        self.mean.update(logits.mean(dim=1))
        self.log("val_accuracy", self.val_accuracy)
        self.log("val_loss", F.cross_entropy(logits, y))

    def on_validation_epoch_end(self) -> None:
        self.computed.append(float(self.mean.compute()))
        self.mean.reset()

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("test_loss", loss)
        return {"loss": loss}

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).softmax(dim=-1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class _Seen(Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.bar: list[dict[str, float]] = []
        self.outputs: list[np.ndarray] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({name: float(value) for name, value in sorted(trainer.callback_metrics.items())})
        self.bar.append(dict(trainer.progress_bar_metrics))
        self.outputs.append(outputs["logits"].numpy())
        assert outputs["logits"].shape[0] == batch[0].shape[0]

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.logged.append({name: float(value) for name, value in sorted(trainer.callback_metrics.items())})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def _loaders() -> tuple[DataLoader, DataLoader]:
    # 43 samples: batches of 9 and 7 make micro-batches of two sizes, and the last that is held out has one sample.
    dataset = ZOO["mlp"].loader(batches=1, batch_size=43).dataset
    return DataLoader(dataset, batch_size=9), DataLoader(dataset, batch_size=7)


def _fit_test_predict(folder: Path, ranks: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module, seen = Classifier(), _Seen()
    checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, filename="{epoch}")
    stopping = EarlyStopping("val_loss", patience=1, min_delta=0.3)
    trainer = pl.Trainer(
        max_epochs=6, accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[seen, checkpoint, stopping], use_distributed_sampler=False, **options,
    )  # fmt: skip
    train, held_out = _loaders()
    trainer.fit(module, train, held_out)
    tested = trainer.test(module, held_out, verbose=False)
    predicted = trainer.predict(module, held_out)
    return {
        "logged": seen.logged,
        "bar": seen.bar,
        "outputs": np.concatenate(seen.outputs),
        "rates": seen.rates,
        "best": (Path(checkpoint.best_model_path).name, float(checkpoint.best_model_score)),
        "stopped": (trainer.current_epoch, stopping.stopped_epoch),
        "computed": module.computed,
        "tested": tested,
        "predicted": torch.cat(predicted).numpy(),
    }


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_on_ranks(lambda: _fit_test_predict(folder, 1), 1)[0]


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("gpipe", marks=pytest.mark.slow)])
def test_logs_metrics_callbacks_and_outputs_are_those_of_one_device_on_every_rank(one_device, tmp_path, schedule):
    def fit() -> dict[str, Any]:
        return _fit_test_predict(tmp_path, 2, strategy=memopt.PipelineParallelStrategy(schedule, microbatches=4))

    for seen in run_on_ranks(fit, 2, deadline_seconds=90):
        assert [list(logged) for logged in seen["logged"]] == [list(logged) for logged in one_device["logged"]]
        for ours, theirs in zip(seen["logged"], one_device["logged"], strict=True):
            np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(seen["bar"], one_device["bar"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4) and "loss_step" in ours
        np.testing.assert_allclose(seen["outputs"], one_device["outputs"], rtol=1e-3, atol=1e-4)
        assert seen["rates"] == one_device["rates"]
        assert seen["best"][0] == one_device["best"][0]
        assert seen["stopped"] == one_device["stopped"]
        np.testing.assert_allclose(seen["computed"], one_device["computed"], rtol=1e-3, atol=1e-4)
        assert seen["tested"][0]["test_loss"] == pytest.approx(one_device["tested"][0]["test_loss"], rel=1e-4)
        np.testing.assert_allclose(seen["predicted"], one_device["predicted"], rtol=1e-3, atol=1e-4)


class Measures(Classifier):
    """Logs metrics of which a batch's value is no mean of its parts' on steps, one of them called twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        of_classes = {"num_classes": 4, "average": "macro"}
        self.metrics = MetricCollection([Accuracy("multiclass", **of_classes), F1Score("multiclass", **of_classes)])
        self.twice = Accuracy("multiclass", **of_classes)
        self.correlation = PearsonCorrCoef()  # updates twice in a forward
        self.losses = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.metrics(logits, y)
        self.twice(-logits, y)
        self.twice(logits, y)
        self.correlation(logits[:, 0], y.float())
        self.losses(loss)
        self.log_dict(self.metrics, on_step=True, on_epoch=True)
        for name in ("twice", "correlation", "losses"):
            self.log(name, getattr(self, name), on_step=True, on_epoch=name != "losses")
        return {"loss": loss, "logits": logits.detach()}


def test_metrics_of_steps_are_those_of_the_whole_batch():
    def logged(ranks: int, **options: Any) -> list[dict[str, float]]:
        torch.manual_seed(0)
        seen = _Seen()
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=[seen], use_distributed_sampler=False,
            limit_val_batches=0, **options,
        )  # fmt: skip
        module = Measures()
        module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.02)
        trainer.fit(module, _loaders()[0])
        return seen.logged

    plain = run_on_ranks(lambda: logged(1), 1)[0]
    for seen in run_on_ranks(lambda: logged(2, strategy=memopt.PipelineParallelStrategy(microbatches=4)), 2):
        for ours, theirs in zip(seen, plain, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


class SeesBatches(Callback):
    def __init__(self) -> None:
        self.sums: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sums.append(float(batch[0].sum()))


class Uneven(Classifier):
    """Draws more random numbers in its first stage than in its last, and has an example input for the summary."""

    def __init__(self) -> None:
        super().__init__()
        drops = nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32)
        self.net = nn.Sequential(*drops, nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
        self.example_input_array = torch.zeros(2, 16)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_stages_that_draw_unequally_many_random_numbers_get_the_same_shuffled_batches_in_every_epoch():
    def fit() -> tuple[list[float], bool]:
        seen, data = SeesBatches(), ZOO["mlp"].loader(4).dataset
        loader = DataLoader(data, batch_size=4, shuffle=True)
        pl.seed_everything(0)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="memopt_pp", max_epochs=3, use_distributed_sampler=False,
            callbacks=[seen], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(module := Uneven(), loader)
        return seen.sums, module.example_input_array is not None

    (first, is_kept), (second, _) = run_on_ranks(fit, 2)
    assert first == second and is_kept
    epochs = [first[i : i + len(first) // 3] for i in range(0, len(first), len(first) // 3)]
    assert epochs[0] != epochs[1] != epochs[2]
