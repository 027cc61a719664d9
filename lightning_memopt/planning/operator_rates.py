"""How fast single operators are, from training steps of two small networks with each operator timed."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_memopt.techniques.checkpointing.profile import is_product, product_flops

_SECONDS_EACH = 0.2
"""For one figure; slow ones take as long as two runs."""

_LEAST_MOVED = 2**17
"""Bytes of a call from which on its time says how fast it works and not how long a call takes."""


def quickest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the quickest of a few runs after one that is not counted: others only ever make it slower."""
    run()
    best, end = float("inf"), time.perf_counter() + _SECONDS_EACH
    while best == float("inf") or time.perf_counter() < end:
        begin = clock(device)
        run()
        best = min(best, clock(device) - begin)
    return best


def clock(device: torch.device) -> float:
    """Seconds, once what ``device`` was given is done: of a CPU those that this thread computed.

    On a shared machine another process may have the processor for most of a measurement.
    """
    if device.type == "cpu":
        return time.thread_time()
    wait_for(device)
    return time.perf_counter()


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        images = torch.randn(size, 3, 32, 32, device=next(self.parameters()).device)
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
        begin = clock(self._device)
        result = func(*args, **kwargs)
        took = clock(self._device) - begin
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        moved = sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *outputs))
        if outputs and not func.is_view and moved >= _LEAST_MOVED:
            key = f"{func.overloadpacket} {str(outputs[0].dtype).removeprefix('torch.')}"
            self.seconds[key] += took
            self.work[key] += product_flops(func, args, kwargs, result) if is_product(func) else moved
        return result


def operator_rates(device: torch.device) -> dict[str, float]:
    """What :attr:`~lightning_memopt.planning.devices.DeviceModel.operator_rates` holds, for what two networks run."""
    scale = 16 if device.type == "cuda" else 1
    rates: dict[str, float] = {}
    for model, size in ((_Text(128), 4 * scale), (_Image(16), 16 * scale)):
        for dtype in (torch.float32, torch.bfloat16):
            # What autocast leaves in single precision was measured without it.
            rates = _rates_of_training(model.to(device), size, dtype, device) | rates
    return dict(sorted(rates.items()))


def _rates_of_training(model: nn.Module, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    rates: dict[str, float] = {}

    def step() -> None:
        with _Stopwatch(device) as watch:
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                loss = model(size)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for key, seconds in watch.seconds.items():
            rates[key] = max(rates.get(key, 0.0), watch.work[key] / seconds)

    quickest(step, device)
    return rates
