import lightning.pytorch as pl
import torch
from torch import nn

import lightning_memopt as memopt
from tests.planning.allocator import raw_peak_bytes


class _TiedHead(pl.LightningModule):
    """An embedding of 4 MiB that is the head's weight too, its loss computed in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, 128)
        self.mix = nn.Linear(128, 128)

    def training_step(self, batch, batch_idx):
        hidden = self.mix(self.embed(batch[:, :-1]))
        return memopt.chunked_cross_entropy(hidden, self.embed.weight, batch[:, 1:])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def _build() -> pl.LightningModule:
    torch.manual_seed(0)
    return _TiedHead()


def test_a_tied_weights_gradient_that_the_forward_computed_is_summed_in_place_as_autograd_does_unwatched():
    batch = torch.arange(64).view(2, 32)
    raw_bytes = raw_peak_bytes(_build, batch, [memopt.MicroBatching(1)])
    for report in (
        memopt.measure_memory(_build(), batch, callbacks=[memopt.MicroBatching(1)]),
        memopt.predict_memory(_build(), batch, callbacks=[memopt.MicroBatching(1)]),
    ):
        assert abs(report.peak_bytes - raw_bytes) <= 0.002 * raw_bytes
