"""How long a step takes: each operator by the slower of its arithmetic and its memory, and what devices wait for.

The roofline of Williams et al. 2009, with the time that PyTorch needs to issue a call on top. PyTorch's own
estimators (``torch.distributed._tools``) end the interpreter where there is no CUDA.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

from lightning_memopt.planning.devices import CollectiveKind, DeviceModel
from lightning_memopt.planning.operators import OperatorCall, Part

_OVERLAPPED = 0.9
"""Part of the computing beside which a GPU can communicate: the first gather and the last reduction have none."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on; they do not overlap.

    Attributes:
        compute: Forward and backward.
        recompute: Activations that are computed again.
        optimizer: The optimizer's step.
        communication: Collectives that nothing is computed beside.
        offload: Copies to the host and back that nothing is computed beside.
        idle: Waiting for other stages of a pipeline.
    """

    compute: float = 0.0
    recompute: float = 0.0
    optimizer: float = 0.0
    communication: float = 0.0
    offload: float = 0.0
    idle: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


class Transfer(NamedTuple):
    """Collectives, or copies, that are alike.

    Attributes:
        kind: Which collective, or ``"offload"``: a copy between the device and its host.
        size_bytes: Bytes of the whole tensor of one of them.
        times: How many in a step.
        ranks: How many take part.
        nodes: On how many nodes.
        is_overlapped: Whether other work is issued beside it (gradients reduced while the backward goes on).
    """

    kind: CollectiveKind | str
    size_bytes: float
    times: int = 1
    ranks: int = 1
    nodes: int = 1
    is_overlapped: bool = False


def operator_seconds(
    call: OperatorCall, device: DeviceModel, sharing: int = 1, recompute_overhead: float | None = None
) -> float:
    """Time of all calls of one row: the slower of arithmetic and memory, and the time to issue them.

    Args:
        call: One row of :attr:`~lightning_memopt.planning.operators.OperatorLog.calls`.
        device: Where it runs.
        sharing: Ranks that compute on this one device at once, as those of a CPU do.
        recompute_overhead: Seconds of issuing a call that is computed again; as of any call by default.
    """
    rate = device.operator_rates.get(f"{call.name} {call.dtype}")
    if rate is None:
        busy = max(call.flops / device.flops_of(call.dtype), call.moved_bytes / device.memory_bandwidth)
    else:
        busy = (call.flops or call.moved_bytes) / rate
    busy *= sharing
    overhead = device.operator_overhead
    if call.part == "recompute" and recompute_overhead is not None:
        overhead = recompute_overhead
    if device.kind == "cuda":  # the host issues the next call while the device is busy
        return call.times * max(busy, overhead)
    return call.times * (busy + overhead)


def busy_seconds(
    calls: Iterable[OperatorCall], device: DeviceModel, sharing: int = 1, recompute_overhead: float | None = None
) -> dict[Part, float]:
    """Time that a rank computes, by part of the step; arguments as for :func:`step_time`."""
    spent: dict[Part, float] = {"forward": 0.0, "backward": 0.0, "recompute": 0.0, "optimizer": 0.0}
    for call in calls:
        spent[call.part] += operator_seconds(call, device, sharing, recompute_overhead)
    return spent


def step_time(
    calls: Iterable[OperatorCall],
    device: DeviceModel,
    *,
    transfers: Iterable[Transfer] = (),
    sharing: int = 1,
    recompute_overhead: float | None = None,
) -> StepTime:
    """Time of one optimizer step of one rank.

    Args:
        calls: What the rank computes in the step, all micro-batches together.
        device: What it computes on.
        transfers: What it sends and receives.
        sharing: Ranks that compute on this one device at once.
        recompute_overhead: As for :func:`operator_seconds`.

    Returns:
        Seconds by part.
    """
    spent = busy_seconds(calls, device, sharing, recompute_overhead)
    busy = spent["forward"] + spent["backward"] + spent["recompute"]
    exposed = _exposed(list(transfers), device, busy)
    return StepTime(
        compute=spent["forward"] + spent["backward"],
        recompute=spent["recompute"],
        optimizer=spent["optimizer"],
        communication=exposed["communication"],
        offload=exposed["offload"],
    )


def transfer_seconds(transfer: Transfer, device: DeviceModel) -> float:
    """Time of all transfers of one row, whatever runs beside them."""
    if transfer.kind == "offload":
        return transfer.times * transfer.size_bytes / device.host_link
    kind: CollectiveKind = transfer.kind  # type: ignore[assignment]
    return transfer.times * device.collective_seconds(kind, transfer.size_bytes, transfer.ranks, transfer.nodes)


def _exposed(transfers: list[Transfer], device: DeviceModel, busy: float) -> dict[str, float]:
    """Seconds that nothing is computed beside; on a CPU none are beside, since its cores do the copying too."""
    waited = {"communication": 0.0, "offload": 0.0}
    hidden = dict(waited)
    for transfer in transfers:
        part = "offload" if transfer.kind == "offload" else "communication"
        is_beside = transfer.is_overlapped and device.kind == "cuda"
        (hidden if is_beside else waited)[part] += transfer_seconds(transfer, device)
    # The host's link and the network are two: each hides behind the same computing.
    return {part: waited[part] + max(hidden[part] - _OVERLAPPED * busy, 0.0) for part in waited}
