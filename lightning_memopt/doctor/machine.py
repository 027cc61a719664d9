"""What is installed, what devices there are, and what they can do."""

import importlib.metadata
import os
import platform
from typing import Any

import torch
import torch.distributed as dist

from lightning_memopt.__about__ import __version__

_PACKAGES = ("torch", "lightning", "torchao", "bitsandbytes", "torch-pruning", "transformers", "scipy", "matplotlib")


def describe_machine() -> dict[str, Any]:
    """Versions, devices and abilities, as JSON has them."""
    return {"versions": _versions(), "devices": _devices(), "abilities": _abilities()}


def _versions() -> dict[str, str | None]:
    """By package; None where it is not installed."""
    versions: dict[str, str | None] = {"lightning_memopt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _devices() -> list[dict[str, Any]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    cpu = {
        "name": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})",
        "kind": "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
    }
    return [cpu, *map(_gpu, range(torch.cuda.device_count()))]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    peers = [
        other
        for other in range(torch.cuda.device_count())
        if other != index and torch.cuda.can_device_access_peer(index, other)
    ]
    return {
        "name": properties.name,
        "kind": "cuda",
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "reaches_directly": peers,
    }


def _abilities() -> dict[str, bool]:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return {
        "CUDA": torch.cuda.is_available(),
        "products in bfloat16 at full speed": capability >= (8, 0) or _cpu_has_bfloat16(),
        "products in float8": capability >= (8, 9),
        "pinned memory, for copies beside computing": torch.cuda.is_available(),
        "several processes by gloo": dist.is_available() and dist.is_gloo_available(),
        "several GPUs by NCCL": torch.cuda.device_count() > 1 and dist.is_nccl_available(),
    }


def _cpu_has_bfloat16() -> bool:
    try:
        return bool(torch.cpu._is_avx512_bf16_supported())
    except AttributeError:  # private; tried with torch 2.11 to 2.13
        return False
