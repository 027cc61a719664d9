"""Measure this machine's device: what :class:`~lightning_memopt.planning.devices.DeviceModel` holds of it."""

import datetime
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_memopt.planning.devices import DeviceModel, Link
from lightning_memopt.planning.known_devices import KNOWN_DEVICES
from lightning_memopt.planning.operators import OperatorLog
from lightning_memopt.techniques.checkpointing.profile import is_product, product_flops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SECONDS_EACH = 0.2
"""For one figure; slow ones take as long as two runs."""

_LEAST_MOVED = 2**17
"""Bytes of a call from which on its time says how fast it works and not how long a call takes."""

_LOOPBACK = {"intra": Link(5e-5, 1e9), "inter": Link(2e-4, 1.25e8)}
"""Between processes of one computer, roughly, and between computers by an Ethernet of 1 Gbit/s."""


def measure_device(links: Mapping[str, Link] | None = None) -> DeviceModel:
    """Measure what PyTorch would train on here: the first GPU, or the CPU with the threads that PyTorch now has.

    It takes a few seconds, and some hundred MiB of memory for their length.

    Args:
        links: What is known of the links; by default those of the shipped GPU, or the order of magnitude of a CPU's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    with _undisturbed(device):
        return DeviceModel(
            name=device_name(),
            kind="cuda" if is_cuda else "cpu",
            memory_bytes=_memory_bytes(device),
            matmul_flops={str(dtype).removeprefix("torch."): _matmul_flops(device, dtype) for dtype in _DTYPES},
            memory_bandwidth=_memory_bandwidth(device),
            host_link=_host_link(device),
            granularity=_granularity(device),
            workspace_bytes=_workspace_bytes(device),
            operator_overhead=_operator_overhead(device),
            links=links or (_links_of_gpu() if is_cuda else _LOOPBACK),
            source=f"measured with torch {torch.__version__}",
            date=datetime.date.today().isoformat(),
            operator_rates=_operator_rates(device),
        )


def device_name() -> str:
    """What distinguishes this device's measurements from those of others."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random numbers as they are."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The quickest of a few runs after one that is not counted: others only ever make it slower."""
    run()
    best, end = float("inf"), time.perf_counter() + _SECONDS_EACH
    while best == float("inf") or time.perf_counter() < end:
        _wait_for(device)
        begin = time.perf_counter()
        run()
        _wait_for(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def _memory_bandwidth(device: torch.device) -> float:
    elements = 2**28 if device.type == "cuda" else 2**23
    a, b, out = (torch.ones(elements, device=device) for _ in range(3))
    return 3 * 4 * elements / _seconds(lambda: torch.add(a, b, out=out), device)


def _host_link(device: torch.device) -> float:
    size = 2**28 if device.type == "cuda" else 2**26
    there = torch.ones(size, dtype=torch.uint8, device=device)
    here = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return size / _seconds(lambda: here.copy_(there), device)


def _granularity(device: torch.device) -> int:
    """PyTorch counts a CPU's bytes as they were asked for; CUDA's caching allocator hands out blocks."""
    if device.type == "cpu":
        return 1
    before = torch.cuda.memory_allocated(device)
    byte = torch.ones(1, dtype=torch.uint8, device=device)
    return torch.cuda.memory_allocated(device) - before if byte.numel() else 1


def _workspace_bytes(device: torch.device) -> int:
    """What the first matrix product leaves behind."""
    if device.type == "cpu":
        return 0
    a = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    cleared = torch.cuda.memory_allocated(device)
    product = a @ a
    held = torch.cuda.memory_allocated(device) - cleared
    return max(held - product.nbytes, before - cleared, 0)


def _links_of_gpu() -> Mapping[str, Link]:
    name = torch.cuda.get_device_name().lower()
    alike = [model for key, model in KNOWN_DEVICES.items() if key.split("-")[0] in name.replace(" ", "")]
    return (alike[0] if alike else KNOWN_DEVICES["rtx3090"]).links


# -- single operators -------------------------------------------------------------------------------------------------


class _Text(nn.Module):
    """The operators of a language model, forward and backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)
        self.qkv, self.up, self.down = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.head = nn.Linear(width, 2000, bias=False)

    def forward(self, size: int) -> torch.Tensor:
        tokens = torch.randint(2000, (size, 128), device=self.head.weight.device)
        x = self.embed(tokens)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(attended.transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(x)) * torch.sigmoid(x.mean()))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        scores = torch.softmax(functional.silu(self.head(x)), dim=-1)
        return functional.cross_entropy(scores.flatten(0, 1), tokens.flatten())


class _Image(nn.Module):
    """The operators of a convolutional network, forward and backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.Tanh(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(width, 10)),
        )

    def forward(self, size: int) -> torch.Tensor:
        images = torch.randn(size, 3, 32, 32, device=self.body[0].weight.device)
        return functional.mse_loss(self.body(images), torch.zeros(size, 10, device=images.device))


class _Stopwatch(TorchDispatchMode):
    """Adds up by operator and dtype how long it took and what it did."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.work: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _wait_for(self._device)
        begin = time.perf_counter()
        result = func(*args, **kwargs)
        _wait_for(self._device)
        took = time.perf_counter() - begin
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        moved = sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *outputs))
        if outputs and not func.is_view and moved >= _LEAST_MOVED:
            key = f"{func.overloadpacket} {str(outputs[0].dtype).removeprefix('torch.')}"
            self.seconds[key] += took
            self.work[key] += product_flops(func, args, kwargs, result) if is_product(func) else moved
        return result


def _operator_rates(device: torch.device) -> dict[str, float]:
    """Rates of the operators of two networks, in single and, for products, in lower precision too."""
    scale = 16 if device.type == "cuda" else 1
    rates: dict[str, float] = {}
    for make, width, size in ((_Text, 128, 4 * scale), (_Image, 16, 16 * scale)):
        model = make(width).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for dtype in (torch.float32, torch.bfloat16):
            measured: dict[str, float] = {}

            def step(model: Any = model, optimizer: Any = optimizer, dtype: Any = dtype, to: Any = measured) -> None:
                with _Stopwatch(device) as watch:
                    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                        loss = model(size)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                for key, seconds in watch.seconds.items():
                    to[key] = max(to.get(key, 0.0), watch.work[key] / seconds)

            _seconds(step, device)
            rates = measured | rates
    return dict(sorted(rates.items()))


def _operator_overhead(device: torch.device) -> float:
    """Seconds a call in training steps so small that nothing but calls is in them."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(8)]
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.ones(2, 8, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()

    seconds = _seconds(step, device)
    with OperatorLog() as log:
        log.start()
        step()
    return seconds / sum(call.times for call in log.calls)
