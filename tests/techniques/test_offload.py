import errno
import fcntl
import gc
import os
import shutil
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from lightning_memopt.memory.report import MemoryReport
from lightning_memopt.memory.track import track_memory
from lightning_memopt.techniques.checkpointing import checkpoint_activations
from lightning_memopt.techniques.offload import offload_activations
from lightning_memopt.techniques.offload_folder import PREFIX
from lightning_memopt.techniques.offload_storage import UNDER_WAY_BYTES, CopyStream, OffloadError
from tests.zoo import ZOO


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))


def _files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.bin"))


def test_a_storage_saved_several_times_is_offloaded_once(tmp_path: Path) -> None:
    net = nn.Linear(16, 48)
    with offload_activations(net, to="disk", min_bytes=0, directory=tmp_path) as store:
        q, k, v = net(torch.ones(8, 16)).split(16, dim=1)
        loss = (q * k * v).sum()
    input_bytes, projected_bytes, product_bytes = 8 * 16 * 4, 8 * 48 * 4, 8 * 16 * 4
    assert store.stored_bytes == input_bytes + projected_bytes + product_bytes
    loss.backward()
    assert store.stored_bytes == 0


def test_what_a_storage_held_before_a_change_in_place_is_kept_apart_from_what_it_holds_after(tmp_path: Path) -> None:
    x = torch.ones(8, requires_grad=True)
    with offload_activations(nn.Linear(1, 1), to="disk", min_bytes=0, directory=tmp_path):
        hidden = x * 2
        first = hidden * hidden.detach()
        hidden.mul_(3)
        loss = (first + hidden * hidden.detach()).sum()
    loss.backward()
    assert torch.equal(x.grad, torch.full((8,), 2 * 2.0 + 6 * 6.0))


@pytest.mark.parametrize("layer", [nn.GRU(8, 16), nn.LSTM(8, 16, proj_size=4), nn.GRUCell(8, 16), nn.LSTMCell(8, 16)])
def test_gates_that_are_chunks_of_one_storage_are_kept_as_they_were_saved(layer: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(4, 8) if isinstance(layer, nn.RNNCellBase) else torch.randn(5, 4, 8)

    def gradients(**offloaded: Any) -> list[torch.Tensor]:
        context = offload_activations(layer, **offloaded) if offloaded else nullcontext()
        with context:
            output = layer(x)
            loss = (output if isinstance(output, torch.Tensor) else output[0]).square().sum()
        return list(torch.autograd.grad(loss, tuple(layer.parameters())))

    torch.testing.assert_close(gradients(to="disk", min_bytes=0, directory=tmp_path), gradients(), rtol=0, atol=0)


def test_parameters_buffers_and_their_views_are_not_offloaded(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32, 32))
            self.frozen = nn.Parameter(torch.ones(32, 32), requires_grad=False)
            self.register_buffer("mask", torch.ones(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((x @ self.weight.t()) @ self.frozen[:, :].t()) * self.mask.view(32, 32)

    module = Scaled()
    with offload_activations(module, to="disk", min_bytes=0, directory=tmp_path) as store:
        out = module(torch.ones(32, 32))
    assert store.stored_bytes == 32 * 32 * 4  # the input
    out.sum().backward()


def test_only_storages_of_the_threshold_or_more_are_moved(tmp_path: Path) -> None:
    net = _net()
    with offload_activations(net, to="disk", min_bytes=8 * 256 * 4, directory=tmp_path) as store:
        loss = net(torch.ones(8, 64)).sum()
    assert store.stored_bytes == 2 * 8 * 256 * 4
    del loss


def test_a_change_in_place_of_a_tensor_that_stays_is_an_error_as_in_plain_training(tmp_path: Path) -> None:
    x = torch.ones(8, requires_grad=True)
    with offload_activations(nn.Linear(1, 1), to="disk", directory=tmp_path):
        hidden = x.exp()
        loss = hidden.sum()
        hidden.data.add_(0)
        hidden.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_files_are_deleted_as_the_backward_uses_them_up_and_the_folder_with_the_last(tmp_path: Path) -> None:
    net = _net()
    with offload_activations(net, to="disk", min_bytes=0, directory=tmp_path):
        loss = net(torch.ones(8, 64)).sum()
    assert len(_files(tmp_path)) >= 3
    loss.backward()
    assert not list(tmp_path.iterdir())


def test_files_are_deleted_when_the_block_raises_though_the_graph_is_alive(tmp_path: Path) -> None:
    net = _net()
    with pytest.raises(KeyError), offload_activations(net, to="disk", min_bytes=0, directory=tmp_path):
        loss = net(torch.ones(8, 64)).sum()
        raise KeyError("stop")
    assert loss.requires_grad
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_named_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: memoryview) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    net = _net()
    with (
        pytest.raises(OffloadError, match=r"offloading 2.0 KiB of activations failed \(No space left on device\)"),
        offload_activations(net, to="disk", min_bytes=0, directory=tmp_path),
    ):
        net(torch.ones(8, 64))
    assert not _files(tmp_path)


def test_a_folder_that_cannot_be_made_or_written_is_a_named_error(tmp_path: Path) -> None:
    net, folder = _net(), tmp_path / "gone"
    folder.mkdir()
    expected = (
        r"offloading 2.0 KiB of activations failed \(No such file or directory\) with 0 B already stored.*/gone"
    )
    with (
        pytest.raises(OffloadError, match=expected),
        offload_activations(net, to="disk", min_bytes=0, directory=folder),
    ):
        folder.rmdir()
        net(torch.ones(8, 64))
    folder.mkdir()
    with (
        pytest.raises(OffloadError, match=r"2.0 KiB of activations failed"),
        offload_activations(net, to="disk", min_bytes=0, directory=folder),
    ):
        net(torch.ones(8, 64)).sum().backward()
        shutil.rmtree(folder)
        net(torch.ones(8, 64))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"")], ids=["deleted", "cut"])
def test_a_file_that_is_deleted_or_cut_before_the_backward_is_a_named_error(spoil: Any, tmp_path: Path) -> None:
    net = _net()
    with offload_activations(net, to="disk", min_bytes=0, directory=tmp_path):
        loss = net(torch.ones(8, 64)).sum()
    for file in _files(tmp_path):
        spoil(file)
    with pytest.raises(OffloadError, match="cannot be read back"):
        loss.backward()


def test_what_a_killed_process_left_is_deleted_and_what_others_use_or_is_not_ours_stays(tmp_path: Path) -> None:
    net = _net()

    def left(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.bin").touch()
        return tmp_path / name

    left(f"{PREFIX}killed")
    others = [left(f"{PREFIX}alive"), left("activations-of-the-user")]
    lock = os.open(others[0], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with offload_activations(net, to="disk", min_bytes=0, directory=tmp_path):
        first = net(torch.ones(8, 64)).sum()
        with offload_activations(net, to="disk", min_bytes=0, directory=tmp_path):
            second = net(torch.ones(8, 64)).sum()
    (first + second).backward()
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert all(len(_files(folder)) == 1 for folder in others)
    os.close(lock)


def test_the_peak_of_the_allocator_does_not_grow_with_depth_and_mapped_files_are_not_in_it(tmp_path: Path) -> None:
    def peak(depth: int) -> float:
        net = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.Tanh())))
        x = torch.ones(4096, 64)
        context = offload_activations(net, to="disk", min_bytes=2**18, directory=tmp_path)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, context:
            net(x).sum().backward()
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        in_use = [0, *accumulate(event.nbytes() for event in events if event.name() == "[memory]")]
        return max(in_use) / (4096 * 64 * 4)

    # The gradient of a layer's output and that of its input; the layer's own input is in a file.
    assert 2 <= peak(3) < 2.5
    assert 2 <= peak(9) < 2.8  # and the gradients of more weights


def test_on_fake_tensors_nothing_is_written_and_the_predicted_peak_is_that_of_the_real_run(tmp_path: Path) -> None:
    files = []

    def run() -> MemoryReport:
        net, x = _net(), torch.ones(4096, 64)
        with (
            track_memory(net, x) as tracker,
            offload_activations(net, to="disk", min_bytes=2**12, directory=tmp_path) as store,
        ):
            out = net(x).sum()
            assert store.stored_bytes >= 2 * 4096 * 256 * 4
            files.append(len(_files(tmp_path)))
            out.backward()
        return tracker.report()

    real = run()
    with FakeTensorMode():
        predicted = run()
    assert files[0] > 0
    assert files[1] == 0
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    # Without offloading two activations are held at the peak.
    assert real.by_category["activations"] < 0.2 * 4096 * 256 * 4


def test_the_inputs_of_checkpointed_blocks_are_offloaded(tmp_path: Path) -> None:
    entry = ZOO["encoder"]
    module, batch = entry.build(), entry.batch()
    input_bytes = 8 * 12 * 32 * 4
    with checkpoint_activations(module.encoder, "full"):
        x = module.embed(batch["tokens"])
        with offload_activations(module, to="disk", min_bytes=input_bytes, directory=tmp_path) as store:
            loss = module.encoder(x).sum()
        assert store.stored_bytes == 3 * input_bytes
        loss.backward()


def test_a_compiled_module_is_offloaded_and_matches(tmp_path: Path) -> None:
    net, x = _net(), torch.randn(8, 64)
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    compiled = torch.compile(net, backend="aot_eager")
    with offload_activations(net, to="disk", min_bytes=0, directory=tmp_path) as store:
        loss = compiled(x).sum()
    assert store.stored_bytes > 0
    loss.backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_graph_that_is_dropped_without_backward_leaves_no_files(tmp_path: Path) -> None:
    net = _net()
    with offload_activations(net, to="disk", min_bytes=0, directory=tmp_path):
        loss = net(torch.ones(8, 64)).sum()
    del loss
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_host_waits_for_old_copies_so_that_those_under_way_hold_little_on_the_device() -> None:
    ended: list[int] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            ended.append(self.number)

    copies = CopyStream(None)
    waited = []
    for number in range(4):
        copies.add(Event(number), UNDER_WAY_BYTES)
        waited.append(list(ended))
    assert waited == [[], [], [0], [0, 1]]


@pytest.mark.gpu
def test_what_is_offloaded_serves_again_while_the_forward_goes_on(cuda: torch.device) -> None:
    net = nn.Sequential(*(layer for _ in range(32) for layer in (nn.Linear(512, 512), nn.GELU()))).to(cuda)
    x = torch.randn(32768, 512, device=cuda)  # 64 MiB, as each of the 64 tensors that are saved
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(cuda)
    with offload_activations(net, to="cpu"):
        net(x).sum().backward()
    assert torch.cuda.max_memory_reserved(cuda) < 2 * 2**30


@pytest.mark.gpu
def test_offloading_to_pinned_memory_gives_the_gradients_of_plain_training(cuda: torch.device) -> None:
    net = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU()))).to(cuda)
    x = torch.randn(4096, 512, device=cuda)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    for _ in range(20):
        net.zero_grad()
        with offload_activations(net, to="cpu", min_bytes=0):
            net(x).square().sum().backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))
