"""Measure this machine's device: what :class:`~lightning_memopt.planning.devices.DeviceModel` holds of it."""

import datetime
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from lightning_memopt.planning.devices import DeviceModel, Link
from lightning_memopt.planning.known_devices import KNOWN_DEVICES
from lightning_memopt.planning.operator_rates import operator_rates, quickest
from lightning_memopt.planning.overheads import measure_overheads

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
        overheads = measure_overheads(device)
        return DeviceModel(
            name=device_name(),
            kind="cuda" if is_cuda else "cpu",
            memory_bytes=_memory_bytes(device),
            matmul_flops={str(dtype).removeprefix("torch."): _matmul_flops(device, dtype) for dtype in _DTYPES},
            memory_bandwidth=_memory_bandwidth(device),
            host_link=_host_link(device),
            granularity=_granularity(device),
            workspace_bytes=_workspace_bytes(device),
            operator_overhead=overheads.operator,
            links=links or (_links_of_gpu() if is_cuda else _LOOPBACK),
            source=source(),
            date=datetime.date.today().isoformat(),
            operator_rates=operator_rates(device),
            recompute_overheads=overheads.recomputed,
            micro_batch_overhead=overheads.micro_batch,
        )


def device_name() -> str:
    """What distinguishes this device's measurements from those of others."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def source() -> str:
    """By what measurements of today are made; those by another are not comparable."""
    return f"measured in thread time and with overheads, by torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random numbers as they are."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / quickest(lambda: a @ b, device)


def _memory_bandwidth(device: torch.device) -> float:
    elements = 2**28 if device.type == "cuda" else 2**23
    a, b, out = (torch.ones(elements, device=device) for _ in range(3))
    return 3 * 4 * elements / quickest(lambda: torch.add(a, b, out=out), device)


def _host_link(device: torch.device) -> float:
    size = 2**28 if device.type == "cuda" else 2**26
    there = torch.ones(size, dtype=torch.uint8, device=device)
    here = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return size / quickest(lambda: here.copy_(there), device)


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
