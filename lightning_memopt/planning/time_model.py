"""Time of one step, from the operators of its trace."""

from collections import defaultdict

from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.space import Layout
from lightning_memopt.planning.trace import StepTrace

_PART = {"forward": "compute", "backward": "compute", "recompute": "recompute", "optimizer": "optimizer"}


def step_seconds(trace: StepTrace, layout: Layout, device: DeviceModel) -> dict[str, float]:
    """Seconds of one batch by part: each operator takes as long as it computes or moves, whichever is longer."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for call in trace.operators:
        once = max(call.flops / device.flops_of(call.dtype), call.moved_bytes / device.memory_bandwidth)
        seconds[_PART[call.part]] += call.count * (once + device.operator_overhead)
    return dict(seconds)
