"""Embeddings with sparse gradients: how many elements these have follows from the ids of the batch."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, SparseAdam

import lightning_memopt as memopt
from tests.planning.allocator import raw_peak_bytes


class _Rows(pl.LightningModule):
    embedding = partial(nn.Embedding, 1000, 64, sparse=True)
    optimizer = SparseAdam

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.embedding()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def loss(self, batch):
        return self.rows(batch).square().mean()

    def configure_optimizers(self):
        return type(self).optimizer(self.parameters())


class Padded(_Rows):
    embedding = partial(nn.Embedding, 1000, 64, sparse=True, padding_idx=3)


class SummedByAdagrad(_Rows):
    embedding = partial(nn.EmbeddingBag, 1000, 64, sparse=True, mode="sum", padding_idx=3)
    optimizer = Adagrad


class BagsBySGD(_Rows):
    embedding = partial(nn.EmbeddingBag, 1000, 64, sparse=True)
    optimizer = partial(SGD, lr=0.1)


class ReadTwice(_Rows):
    def loss(self, batch):
        return super().loss(batch) + self.rows(batch.flip(0)[:20]).mean()


class ByMomentum(_Rows):
    optimizer = partial(SGD, lr=0.1, momentum=0.9)


class ComputesItsIds(_Rows):
    def loss(self, batch):
        return super().loss((batch.float() * 1.0).long())


def _ids() -> torch.Tensor:
    ids = torch.randint(0, 1000, (64, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 3
    return ids


CALLBACKS = {
    "alone": list,
    "accumulated": lambda: [memopt.GradientAccumulation(2)],
    "in micro-batches": lambda: [memopt.MicroBatching(16)],
    "in backward": lambda: [memopt.OptimizerInBackward()],
}
CASES = [
    (_Rows, "alone"),
    (SummedByAdagrad, "alone"),
    (BagsBySGD, "alone"),
    (BagsBySGD, "in micro-batches"),
    (ReadTwice, "accumulated"),
    (ByMomentum, "in micro-batches"),
    (Padded, "in backward"),
]


@pytest.mark.parametrize(("module", "how"), CASES)
def test_steps_with_sparse_gradients_are_measured_and_predicted_as_the_allocator_counts(module, how):
    make = CALLBACKS[how]
    raw = raw_peak_bytes(module, _ids(), make())
    assert memopt.measure_memory(module(), _ids(), callbacks=make()).peak_bytes == pytest.approx(raw, rel=0.005)
    predicted = memopt.predict_memory(module(), _ids(), callbacks=make())
    assert predicted.peak_bytes == pytest.approx(raw, rel=0.005)
    assert not predicted.notes


def test_rows_that_a_step_computes_are_counted_as_all_different_and_the_prediction_says_so():
    raw = raw_peak_bytes(ComputesItsIds, _ids())
    predicted = memopt.predict_memory(ComputesItsIds(), _ids())
    assert raw < predicted.peak_bytes < 1.3 * raw
    assert "how many rows a sparse gradient has could not be told" in " ".join(predicted.notes)
