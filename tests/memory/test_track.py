from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_memopt as memopt
from lightning_memopt.memory.track import track_memory
from tests.zoo import ZOO


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def _trained(net: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    net(batch).square().mean().backward()
    optimizer.step()


def _bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_parameters_gradients_optimizer_state_and_batch_are_counted_to_the_byte():
    net, batch = _net(), torch.randn(16, 32)
    optimizer = torch.optim.AdamW(net.parameters())
    _trained(net, optimizer, batch)
    with track_memory(net, optimizer, {"x": [batch]}) as tracker:
        _trained(net, optimizer, batch)
    report = tracker.report()
    assert report.by_category["parameters"] == _bytes_of(net.parameters())
    assert report.by_category["optimizer_state"] == _bytes_of(v for s in optimizer.state.values() for v in s.values())
    assert report.by_category["gradients"] <= _bytes_of(net.parameters())
    assert report.by_category["other"] == batch.nbytes
    assert sum(report.by_category.values()) == sum(report.by_submodule.values()) == report.peak_bytes
    assert {point.phase for point in report.timeline} >= {"forward", "backward", "step"}


def test_activations_are_those_that_the_backward_needs():
    net, batch = _net(), torch.randn(1024, 32)
    with track_memory(net, batch) as tracker:
        net(batch).square().mean().backward()
    # At the peak, in ReLU's backward, its output is left: 1024 x 64 floats. The first layer's input is the batch.
    assert tracker.report().by_category["activations"] == 1024 * 64 * 4


def test_what_a_convolution_allocates_inside_itself_is_in_the_peak():
    conv, image = nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 32, 32)
    with torch.no_grad(), track_memory(conv, image) as tracker:
        out = conv(image)
    report = tracker.report()
    assert report.peak_bytes >= image.nbytes + out.nbytes + _bytes_of(conv.parameters())
    assert report.by_submodule[""] >= image.nbytes
    assert not report.notes


def test_a_submodule_called_three_times_in_a_step_is_counted_three_times():
    block, batch = nn.Linear(64, 64), torch.randn(256, 64)
    root = nn.ModuleDict({"block": block})

    def activations(calls: int) -> int:
        with track_memory(root, batch) as tracker:
            hidden = batch
            for _ in range(calls):
                hidden = torch.tanh(block(hidden))
            hidden.sum().backward()
        return tracker.report().by_category["activations"]

    assert activations(3) == pytest.approx(3 * activations(1), rel=0.01)


def test_recomputed_activations_are_activations_and_fewer():
    layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6))
    batch = torch.randn(128, 64)

    def run(recompute: bool) -> dict[str, int]:
        with track_memory(layers, batch) as tracker:
            hidden = batch
            for layer in layers:
                hidden = checkpoint(layer, hidden, use_reentrant=False) if recompute else layer(hidden)
            hidden.sum().backward()
        return dict(tracker.report().by_category)

    assert 0 < run(recompute=True)["activations"] < 0.4 * run(recompute=False)["activations"]


def test_each_submodule_owns_its_parameters_its_gradients_and_their_state():
    net, batch = _net(), torch.randn(4, 32)
    optimizer = torch.optim.Adam(net.parameters())
    _trained(net, optimizer, batch)
    with track_memory(net, optimizer) as tracker:
        pass
    weights = _bytes_of(net[0].parameters())
    assert tracker.report().by_submodule["0"] == pytest.approx(4 * weights, abs=16)  # and two step counters


def test_two_optimizers_and_frozen_parameters_are_tracked():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False)
    optimizers = [torch.optim.SGD(first.parameters(), momentum=0.9, lr=0.1), torch.optim.Adam(second.parameters())]
    with track_memory(first, second, optimizers) as tracker:
        for _ in range(2):
            second(first(torch.randn(4, 16))).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    report = tracker.report()
    assert report.by_category["parameters"] == 2 * _bytes_of(first.parameters())
    assert report.by_category["optimizer_state"] == _bytes_of(first.parameters())


def test_code_without_modules_is_tracked():
    with track_memory() as tracker:
        weight = torch.zeros(1000, requires_grad=True)
        held = tracker.current_bytes
        (weight * 2).sum().backward()
    assert held == 4000
    assert 8000 <= tracker.report().peak_bytes < 8100  # the weight, and its double or its gradient


def test_what_is_freed_after_the_block_does_not_change_the_report():
    with track_memory() as tracker:
        held = torch.zeros(1000)
    del held
    assert tracker.report().peak_bytes == 4000


def test_an_error_inside_leaves_no_mode_hook_or_profiler_behind():
    from torch.nn.modules.module import _global_forward_hooks
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    net = _net()
    with pytest.raises(RuntimeError, match="mine"), track_memory(net):
        net(torch.randn(2, 32)).sum().backward()
        raise RuntimeError("mine")
    assert not _get_current_dispatch_mode_stack() and not _global_forward_hooks
    assert not torch.autograd._profiler_enabled()
    assert not any(parameter._backward_hooks for parameter in net.parameters())


def test_under_another_profiler_it_measures_and_says_what_is_missing():
    net = _net()
    with torch.autograd.profiler.profile(), track_memory(net) as tracker:
        net(torch.randn(2, 32)).sum().backward()
    assert "another profiler" in tracker.report().notes[0]
    assert tracker.report().peak_bytes > _bytes_of(net.parameters())


def test_the_report_inside_the_block_and_strange_arguments_are_refused():
    with track_memory() as tracker, pytest.raises(ValueError, match="before its block ended"):
        tracker.report()
    with pytest.raises(ValueError, match="given a str"):
        track_memory("model")


@pytest.mark.gpu
def test_on_cuda_the_allocator_is_reconciled(cuda):
    net, batch = nn.Conv2d(8, 8, 3).to(cuda), torch.randn(4, 8, 32, 32, device=cuda)

    def step():
        net.zero_grad()
        F.relu(net(batch)).sum().backward()
        net.zero_grad()

    step()  # cuDNN and cuBLAS take what they keep
    untracked = torch.cuda.memory_allocated(cuda) - sum(t.nbytes for t in (*net.parameters(), batch))
    torch.cuda.reset_peak_memory_stats(cuda)
    step()
    plain_peak = torch.cuda.max_memory_allocated(cuda) - untracked
    with track_memory(net, batch) as tracker:
        step()
    report = tracker.report()
    assert report.device == "cuda"
    assert report.peak_bytes == pytest.approx(plain_peak, rel=0.02, abs=4096)  # blocks are multiples of 512 bytes
    assert "beyond its peak" in report.notes[-1]


@pytest.mark.gpu
def test_on_cuda_a_step_is_measured_there_though_the_module_was_built_on_the_cpu(cuda):
    entry = ZOO["mlp"]
    report = memopt.measure_memory(entry.build(), entry.batch(), accelerator="gpu")
    on_cpu = memopt.measure_memory(entry.build(), entry.batch())
    assert report.device == "cuda"
    assert report.by_category["parameters"] >= on_cpu.by_category["parameters"] > 0
    assert "beyond its peak" in report.notes[-1]


@pytest.mark.parametrize("is_predicted", [False, True])
def test_tensors_without_data_of_somebody_else_take_no_memory(is_predicted):
    # A pipeline has such in place of what other stages hold.
    mode = FakeTensorMode()
    with mode:
        elsewhere = nn.Linear(64, 64)
    with FakeTensorMode() if is_predicted else nullcontext(), track_memory(elsewhere) as tracker:
        held = torch.empty(8)
        with unset_fake_temporarily():
            elsewhere(elsewhere.weight).relu()
    assert tracker.report().peak_bytes == pytest.approx(held.nbytes, abs=100)  # torch's own scalars beside them


def test_a_tracker_that_is_entered_again_reports_the_last_block_and_not_the_first():
    net = nn.Linear(8, 8)
    tracker = memopt.track_memory(net)
    with pytest.raises(RuntimeError), tracker:
        net(torch.randn(4, 9))
    first = tracker.report().peak_bytes
    with tracker:
        net(torch.randn(4, 8)).sum().backward()
    assert tracker.report().peak_bytes > first
    assert tracker.report().source == "measured"
