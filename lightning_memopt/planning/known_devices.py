"""Models of common devices, for planning on a machine that has none of them.

Rates are the vendor's peaks of dense products (for newer cards the datasheets print them with sparsity, which is
twice as much). A step reaches a part of them; the planner compares plans on one device, where the part is much the
same. Memory is the least capacity that PyTorch's own out-of-memory errors name for each card in public reports:
datasheets round, and count what the driver and error correction take.
Latencies are orders of magnitude, which no datasheet has: `lightning-memopt doctor` measures them on the machine.
"""

from typing import NamedTuple

from lightning_memopt.planning.devices import DeviceModel, Link

_LOOKED_UP = "2026-11-25"
_CUDA_GRANULARITY = 512  # c10/cuda/CUDACachingAllocator: kMinBlockSize
_CUDA_LAUNCH = 5e-6  # eager PyTorch issues a kernel in about so long, whichever the card
_INTRA_LATENCY, _INTER_LATENCY = 1e-5, 2e-5

# aten/src/ATen/cuda/CublasHandlePool.cpp: what each handle gets before Hopper, and from Hopper on.
_CUBLAS_BEFORE, _CUBLAS_FROM_HOPPER = 4096 * 1024 * 2 + 16 * 1024 * 8, 4096 * 1024 * 8


class _Row(NamedTuple):
    """One card: GiB; 10^12 operations per second by dtype; GB per second, links one way."""

    memory: float
    float32: float
    tf32: float
    half: float
    has_bfloat16: bool
    bandwidth: float
    host: float
    intra: float
    inter: float
    workspace: int
    source: str


_NVLINK = "links within a node are NVLink, one network port of the vendor's own server per card between nodes"
_PCIE = "links within a node are PCIe, 100 Gbit/s Ethernet per card between nodes"

# fmt: off
_ROWS = {
    #                  GiB    fp32    tf32   fp16  bf16?    mem   host  intra inter
    "a100-40gb": _Row(39.25, 19.5,  156.0,  312.0, True,  1555.0, 32.0, 300.0, 25.0, _CUBLAS_BEFORE,
                      f"NVIDIA A100 datasheet (2021-06), DGX A100; {_NVLINK}"),
    "a100-80gb": _Row(79.14, 19.5,  156.0,  312.0, True,  2039.0, 32.0, 300.0, 25.0, _CUBLAS_BEFORE,
                      f"NVIDIA A100 datasheet (2021-06, SXM), DGX A100; {_NVLINK}"),
    "h100":      _Row(79.10, 67.0,  494.7,  989.4, True,  3350.0, 64.0, 450.0, 50.0, _CUBLAS_FROM_HOPPER,
                      f"NVIDIA H100 datasheet (2023, SXM), DGX H100; {_NVLINK}"),
    "h200":     _Row(139.72, 67.0,  494.7,  989.4, True,  4800.0, 64.0, 450.0, 50.0, _CUBLAS_FROM_HOPPER,
                      f"NVIDIA H200 datasheet (2024, SXM), DGX H200; {_NVLINK}"),
    "b200":     _Row(178.35, 75.0, 1125.0, 2250.0, True,  8000.0, 64.0, 900.0, 50.0, _CUBLAS_FROM_HOPPER,
                      f"NVIDIA HGX B200 datasheet (2025), DGX B200; {_NVLINK}"),
    "l4":        _Row(22.03, 30.3,   60.0,  121.0, True,   300.0, 32.0,  32.0, 12.5, _CUBLAS_BEFORE,
                      f"NVIDIA L4 datasheet (2023); {_PCIE}"),
    "l40s":      _Row(44.34, 91.6,  183.0,  362.0, True,   864.0, 32.0,  32.0, 12.5, _CUBLAS_BEFORE,
                      f"NVIDIA L40S datasheet (2023); {_PCIE}"),
    "t4":        _Row(14.56,  8.1,    8.1,   65.0, False,  320.0, 16.0,  16.0, 12.5, _CUBLAS_BEFORE,
                      f"NVIDIA T4 datasheet (2019); {_PCIE}"),
    "v100":      _Row(31.73, 15.7,   15.7,  125.0, False,  900.0, 16.0, 150.0, 6.25, _CUBLAS_BEFORE,
                      f"NVIDIA V100 datasheet (2020, SXM2 32 GB), DGX-1; {_NVLINK}"),
    "rtx3090":   _Row(23.56, 35.6,   35.6,   71.0, True,   936.0, 32.0,  32.0, 12.5, _CUBLAS_BEFORE,
                      f"NVIDIA GA102 whitepaper (2020); {_PCIE}"),
    "rtx4090":   _Row(23.52, 82.6,   82.6,  165.2, True,  1008.0, 32.0,  32.0, 12.5, _CUBLAS_BEFORE,
                      f"NVIDIA Ada whitepaper (2022); {_PCIE}"),
}
# fmt: on


def _model(name: str, row: _Row) -> DeviceModel:
    rates = {"float32": row.float32, "tf32": row.tf32, "float16": row.half}
    # Cards without bfloat16 units compute in it as in float32.
    rates["bfloat16"] = row.half if row.has_bfloat16 else row.float32
    return DeviceModel(
        name=name,
        kind="cuda",
        memory_bytes=int(row.memory * 2**30),
        matmul_flops={dtype: rate * 1e12 for dtype, rate in rates.items()},
        memory_bandwidth=row.bandwidth * 1e9,
        host_link=row.host * 1e9,
        granularity=_CUDA_GRANULARITY,
        workspace_bytes=row.workspace,
        operator_overhead=_CUDA_LAUNCH,
        links={
            "intra": Link(_INTRA_LATENCY, row.intra * 1e9),
            "inter": Link(_INTER_LATENCY, row.inter * 1e9),
        },
        source=row.source,
        date=_LOOKED_UP,
    )


KNOWN_DEVICES = {name: _model(name, row) for name, row in _ROWS.items()}
"""The shipped models by name."""
