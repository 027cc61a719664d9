"""What the allocator and libraries of a device make of the bytes of a trace."""

from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.trace import StepTrace


def rank_peak(trace: StepTrace, device: DeviceModel) -> dict[str, int]:
    """Bytes by category at the peak of one rank, and ``"workspace"``, what libraries hold beside it."""
    categories = dict(trace.peak.by_category)
    if device.workspace_bytes:
        categories["workspace"] = device.workspace_bytes
    return categories
