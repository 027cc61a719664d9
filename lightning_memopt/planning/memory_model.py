"""What the allocator and libraries of a device make of the bytes of a trace."""

from collections.abc import Mapping

from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.space import Layout
from lightning_memopt.planning.trace import StepTrace

_ON_HOST = ("parameters", "gradients", "optimizer_state")
"""What offloaded shards leave in the host's memory."""


def rank_peak(trace: StepTrace, layout: Layout, device: DeviceModel) -> dict[str, int]:
    """Bytes by category at the peak of one rank, and ``"workspace"``, what libraries hold beside it."""
    if layout.offloads and device.kind == "cuda":
        # The optimizer steps on the host, so that its temporaries are there too.
        points = [_without_host(point.by_category) for point in trace.points if point.phase != "step"]
        categories = max(points, key=lambda point: sum(point.values()))
    else:
        categories = dict(trace.peak.by_category)
    if device.workspace_bytes:
        categories["workspace"] = device.workspace_bytes
    return categories


def host_bytes(trace: StepTrace) -> int:
    """The most that a rank whose shards are offloaded holds of them in the host's memory."""
    return max(sum(point.by_category[name] for name in _ON_HOST) for point in trace.points)


def _without_host(categories: Mapping[str, int]) -> dict[str, int]:
    return {name: 0 if name in _ON_HOST else size for name, size in categories.items()}
