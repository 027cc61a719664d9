"""Modules as users write them, odd ones too: measured and predicted peaks against the allocator's events."""

from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from tests.parity import train
from tests.planning.allocator import raw_peak_bytes
from tests.zoo import ZOO, slow_where


class _Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def loss(self, batch):
        return F.mse_loss(self.net(batch), batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(parameter for parameter in self.parameters() if parameter.requires_grad)


class SGDWithALossThatReducesInPlace(_Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class BinaryCrossEntropy(SGDWithALossThatReducesInPlace):
    def loss(self, batch):
        return F.binary_cross_entropy(self.net(batch).sigmoid(), batch.sigmoid())


class CalledTwice(_Net):
    def loss(self, batch):
        return F.mse_loss(self.net(self.net(batch)), batch)


class Frozen(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class TwoOptimizersByHand(_Net):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.net[0].parameters()), torch.optim.SGD(self.net[2].parameters(), momentum=0.9)


class ReadsTheTrainersCounters(_Net):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (1 + self.global_step + self.current_epoch + self.trainer.current_epoch)


class RandomNumbers(_Net):
    def loss(self, batch):
        noisy = F.dropout(batch + torch.randn_like(batch) * torch.rand(1), 0.3)
        return F.cross_entropy(self.net(noisy[torch.randperm(64)]), torch.randint(0, 128, (64,)))


class Checkpointed(_Net):
    reentrant = False

    def loss(self, batch):
        hidden = batch.clone().requires_grad_()
        for _ in range(10):
            hidden = checkpoint(self.net, hidden, use_reentrant=self.reentrant)
        return F.mse_loss(hidden, batch)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class InBfloat16FromTheStart(_Net):
    def on_fit_start(self):
        self.net.to(torch.bfloat16)

    def loss(self, batch):
        return super().loss(batch.bfloat16())


class InDoubleFromConfigureModel(_Net):
    def configure_model(self):
        self.net.double()

    def loss(self, batch):
        return super().loss(batch.double())


class GrowsFromEmpty(_Net):
    def loss(self, batch):
        with torch.no_grad():
            joined, grown = torch.empty(0), torch.empty(0)
            torch.cat([batch, batch], out=joined)
            grown.untyped_storage().resize_(4096)
        return super().loss(batch) + joined.mean()


class _ChannelsLast(_Net):
    """Between two convolutions, what lays its results out in ways that fake tensors do not."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *layers, nn.Conv2d(8, 8, 4, stride=2))
        self.net.to(memory_format=torch.channels_last)

    def loss(self, batch):
        images = batch.view(8, 1, 32, 32)
        return self.net(images.contiguous(memory_format=torch.channels_last)).square().mean()


class ReflectionPadding(_ChannelsLast):
    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose2d(8, 8, 4, 2), nn.MaxPool2d(2), nn.ReflectionPad2d(2))


class ReplicationPadding(_ChannelsLast):
    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose2d(8, 8, 4, 2), nn.MaxPool2d(2), nn.ReplicationPad2d(2))


class Gated(_ChannelsLast):
    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose2d(8, 16, 4, 2), nn.MaxPool2d(2), nn.GLU(1))


class Fold(_ChannelsLast):
    def __init__(self) -> None:
        super().__init__(nn.Unfold(3, padding=1), nn.Fold(32, 3, padding=1))


class Spectrum(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(64, 65, dtype=torch.cfloat))

    def loss(self, batch):
        return F.mse_loss(torch.fft.irfft2(torch.fft.rfft2(batch) * self.filter), batch)


class Spectrogram(_Net):
    def loss(self, batch):
        spectra = torch.stft(batch.flatten(), 256, 8, window=torch.hann_window(256), return_complex=True)
        return super().loss(spectra.abs().t()[:64, :128])


class Attention(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.MultiheadAttention(128, 4, dropout=0.1, batch_first=True)

    def loss(self, batch):
        rows = batch.view(4, 16, 128)
        mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), 1)
        return self.net(rows, rows, rows, attn_mask=mask, need_weights=False)[0].square().mean()


class BidirectionalGRU(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(128, 32, 2, bidirectional=True, batch_first=True)

    def loss(self, batch):
        return self.net(batch.view(4, 16, 128))[0].square().mean()


class Volumes(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.ConvTranspose3d(8, 4, 3, stride=2))

    def loss(self, batch):
        return self.net(batch.view(2, 1, 16, 16, 16)).square().mean()


class NormOfTransposed(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.BatchNorm1d(16)

    def loss(self, batch):
        normed = self.norm(batch.view(64, 8, 16).transpose(1, 2)).transpose(1, 2)
        return sum(layer(normed).square().mean() for layer in self.net)


class SegmentsInChannelsLast(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(8, 8, 1)

    def loss(self, batch):
        maps = self.net(batch.view(4, 16, 16, 8).permute(0, 3, 1, 2))
        return F.cross_entropy(F.interpolate(maps, size=(64, 64), mode="bilinear"), torch.ones(4, 64, 64).long())


class ConnectionistTemporal(_Net):
    def loss(self, batch):
        lengths = torch.tensor([3, 9, 5, 2])
        targets = torch.randint(1, 32, (int(lengths.sum()),))
        steps = self.net(batch).view(64, 4, 32).log_softmax(-1)
        return F.ctc_loss(steps, targets, torch.full((4,), 64), lengths, zero_infinity=True)


class GroupedExperts(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 128, 256) / 16)

    def loss(self, batch):
        expert = self.net(batch)[:, :4].argmax(1)
        ends = torch.histc(expert.float(), bins=4, min=0, max=3).cumsum(0).int()
        return F.grouped_mm(batch[expert.argsort()], self.experts, offs=ends).square().mean()


CASES = {
    each.__name__: each
    for each in (
        *(SGDWithALossThatReducesInPlace, BinaryCrossEntropy, CalledTwice, Frozen, TwoOptimizersByHand),
        *(ReadsTheTrainersCounters, RandomNumbers, Checkpointed, CheckpointedReentrant, InBfloat16FromTheStart),
        *(InDoubleFromConfigureModel, Spectrum, Spectrogram, Attention, BidirectionalGRU, Volumes),
        *(NormOfTransposed, SegmentsInChannelsLast, ConnectionistTemporal, GroupedExperts),
        *(GrowsFromEmpty, ReflectionPadding, ReplicationPadding, Gated, Fold),
    )
}


@pytest.mark.parametrize("name", slow_where(CASES, ["BidirectionalGRU"]))
def test_a_module_as_users_write_them_is_measured_and_predicted(name):
    batch = torch.randn(64, 128)
    raw = raw_peak_bytes(CASES[name], batch)
    assert memopt.measure_memory(CASES[name](), batch).peak_bytes == pytest.approx(raw, rel=0.002)
    assert memopt.predict_memory(CASES[name](), batch).peak_bytes == pytest.approx(raw, rel=0.02)


@dataclass(frozen=True)
class _Signals:
    values: torch.Tensor
    name: str = "signals"

    def to(self, device, **_):
        return _Signals(self.values.to(device), self.name)


class TakesADataclass(_Net):
    def loss(self, batch):
        return super().loss(batch.values)


def test_a_batch_that_is_a_dataclass_is_measured_and_predicted_as_its_tensors_are(tmp_path):
    values = torch.randn(64, 128)
    for peak_of, given in (
        (memopt.measure_memory, values),
        (memopt.predict_memory, values),
        (memopt.predict_memory, values.to("meta")),
    ):
        assert peak_of(TakesADataclass(), _Signals(given)).peak_bytes == peak_of(_Net(), given).peak_bytes
    monitor = memopt.MemoryMonitor(dirpath=tmp_path)
    loader = DataLoader([_Signals(values)] * 3, batch_size=None)
    train(TakesADataclass(), loader, steps=3, callbacks=[monitor])
    assert (tmp_path / "memory_report.json").exists()


@pytest.mark.parametrize(
    "runs",
    [
        lambda: torch.rand([]) > 0.4,
        lambda: 1 - torch.rand(1).item() * 0.5 > 0.4,
        lambda: torch.rand([]) < 0.8,
        lambda: torch.rand(1).item() < 0.5,
    ],
)
def test_of_layers_that_are_dropped_at_random_every_one_is_predicted_to_run(runs):
    class DropsLayers(_Net):
        drops = True

        def loss(self, batch):
            output = batch
            for _ in range(8):
                if not self.drops or runs():
                    output = self.net(output)
            return output.square().mean()

    class RunsAll(DropsLayers):
        drops = False

    batch = torch.randn(64, 128)
    assert memopt.predict_memory(DropsLayers(), batch).peak_bytes == pytest.approx(
        raw_peak_bytes(RunsAll, batch), rel=0.02
    )


class ItemOfTheLoss(_Net):
    def loss(self, batch):
        loss = super().loss(batch)
        self.seen = loss.item()
        return loss


class SelectsBySign(_Net):
    def loss(self, batch):
        output = self.net(batch)
        return output[output > 0].sum()


class WantsNumPy(_Net):
    def loss(self, batch):
        loss = super().loss(batch)
        self.seen = loss.detach().numpy()
        return loss


class LimitedMemoryBFGS(_Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (ItemOfTheLoss, r"ItemOfTheLoss cannot .*as_written.py:\d+ runs aten._local_scalar_dense.* \(.item\(\)"),
        (SelectsBySign, r"SelectsBySign cannot .*as_written.py:\d+ runs aten.nonzero"),
        (WantsNumPy, r"WantsNumPy cannot .*as_written.py:\d+ runs Tensor.numpy\(\)"),
        (LimitedMemoryBFGS, r"LimitedMemoryBFGS cannot .*lbfgs.py:\d+ runs aten._local_scalar_dense"),
    ],
)
def test_a_step_that_depends_on_values_is_measured_but_its_prediction_names_operator_and_line(module, message):
    batch = torch.randn(64, 128)
    assert memopt.measure_memory(module(), batch).peak_bytes == pytest.approx(
        raw_peak_bytes(module, batch), rel=0.002
    )
    with pytest.raises(ValueError, match=message + r".*use measure_memory\(\)"):
        memopt.predict_memory(module(), batch)


def test_a_module_that_is_compiled_in_place_is_predicted_as_it_is_written():
    batch = ZOO["mlp"].batch()
    compiled = ZOO["mlp"].build()
    compiled.compile(backend="eager")
    plain, found = (memopt.predict_memory(module, batch) for module in (ZOO["mlp"].build(), compiled))
    assert found.peak_bytes == plain.peak_bytes
