"""What the planner knows of a device: how much it holds, how fast it is, how it talks to others."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]

_TIMES_SENT = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
    "send": lambda ranks: 1.0,
}
"""How often each byte of the whole tensor crosses the link of one rank (nccl-tests, ``doc/PERFORMANCE.md``)."""


@dataclass(frozen=True)
class Link:
    """How devices reach one another.

    Attributes:
        latency: Seconds before the first byte of a message of two ranks arrives.
        bandwidth: Bytes per second that one device sends while it receives as many.
        measured: By collective, pairs of bytes of the whole tensor and seconds over two ranks, smallest first; where
            there are any they are used instead of the two constants.
    """

    latency: float
    bandwidth: float
    measured: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def seconds(self, kind: CollectiveKind, size_bytes: float, ranks: int) -> float:
        """Time of one collective over ``ranks`` that all have this link.

        Args:
            kind: Which collective.
            size_bytes: Bytes of the whole tensor: what an all-gather ends with and a reduce-scatter starts from.
            ranks: How many take part.
        """
        if ranks <= 1 or size_bytes <= 0:
            return 0.0
        hops = math.ceil(math.log2(ranks))  # trees for small messages
        factor = _TIMES_SENT[kind](ranks)
        if points := self.measured.get(kind):
            sent = factor / _TIMES_SENT[kind](2)
            small = points[0][1]
            return hops * small + sent * max(_interpolate(points, size_bytes) - small, 0.0)
        return hops * self.latency + factor * size_bytes / self.bandwidth


def _interpolate(points: tuple[tuple[int, float], ...], size_bytes: float) -> float:
    """Seconds at a size between measured ones; beyond the last at its rate, below the first as the first."""
    if size_bytes <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in pairwise(points):
        if size_bytes <= high:
            return before + (after - before) * (size_bytes - low) / (high - low)
    return points[-1][1] * size_bytes / points[-1][0]


@dataclass(frozen=True)
class DeviceModel:
    """One device and its surroundings, as the planner counts with them.

    Attributes:
        name: What it is called in ``plan(device=...)`` and ``--gpu``.
        kind: ``"cpu"`` or ``"cuda"``.
        memory_bytes: Bytes that PyTorch can have of it.
        matmul_flops: Floating-point operations per second of large matrix products, by the name of the dtype.
        memory_bandwidth: Bytes per second read and written by an elementwise operator.
        host_link: Bytes per second copied from the host's memory, one way.
        granularity: The allocator hands out multiples of so many bytes.
        workspace_bytes: What libraries (cuBLAS) hold from the first step on, outside of what a trace sees.
        operator_overhead: Seconds of a call of an operator that has nothing to do, with what runs around it.
        links: ``"intra"`` between devices of a node, ``"inter"`` between nodes.
        source: Where the numbers are from.
        date: When they were measured, or looked up.
        operator_rates: By operator and dtype of its result (``"aten.gelu float32"``) what was measured of it, per
            second: floating-point operations of products, convolutions and attention, bytes moved of all others.
        recompute_overheads: ``operator_overhead`` of a call that is computed again, by policy (``"full"``,
            ``"selective"``), with what that takes in the first forward; as of any call where it is not known.
        micro_batch_overhead: Seconds of a micro-batch that has nothing to do.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    matmul_flops: Mapping[str, float]
    memory_bandwidth: float
    host_link: float
    granularity: int
    workspace_bytes: int
    operator_overhead: float
    links: Mapping[str, Link]
    source: str
    date: str
    operator_rates: Mapping[str, float] = field(default_factory=dict)
    recompute_overheads: Mapping[str, float] = field(default_factory=dict)
    micro_batch_overhead: float = 0.0

    def flops_of(self, dtype: str) -> float:
        """Operations per second of matrix products in ``dtype`` (``"bfloat16"``), those of float32 where unknown."""
        return self.matmul_flops.get(dtype, self.matmul_flops["float32"])

    def collective_seconds(self, kind: CollectiveKind, size_bytes: float, ranks: int, nodes: int = 1) -> float:
        """Time of one collective.

        Across nodes every device has a network link of its own, so that a ring is as fast as all of a node's
        together, or as the links within the node.

        Args:
            kind: Which collective.
            size_bytes: Bytes of the whole tensor: what an all-gather ends with and a reduce-scatter starts from.
            ranks: How many take part.
            nodes: On how many nodes these ranks are.
        """
        intra, inter = self.links["intra"], self.links["inter"]
        if nodes <= 1:
            return intra.seconds(kind, size_bytes, ranks)
        per_node = max(ranks // nodes, 1)
        if per_node == 1:
            return inter.seconds(kind, size_bytes, ranks)
        ring = min(intra.bandwidth, inter.bandwidth * per_node)
        hops = inter.latency * math.ceil(math.log2(nodes)) + intra.latency * math.ceil(math.log2(per_node))
        return hops + _TIMES_SENT[kind](ranks) * size_bytes / ring

    def to_json(self) -> str:
        """The model as JSON; :meth:`from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "DeviceModel":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is not JSON, or lacks a field.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["links"] = {
                name: Link(
                    link["latency"],
                    link["bandwidth"],
                    {kind: tuple((int(n), float(s)) for n, s in points) for kind, points in link["measured"].items()},
                )
                for name, link in fields["links"].items()
            }
            return cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a device model: {error}") from error


def device_model(name: str) -> DeviceModel:
    """The shipped model of a common device.

    Args:
        name: Such as ``"h100"`` or ``"a100-80gb"``; upper case, spaces and underscores are the same.

    Raises:
        ValueError: An unknown name; the message lists the known.

    Example:
        >>> device_model("h100").memory_bytes // 2**30
        79
    """
    from lightning_memopt.planning.known_devices import KNOWN_DEVICES

    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    if key not in KNOWN_DEVICES:
        alike = [known for known in KNOWN_DEVICES if key and (known.startswith(key) or key.startswith(known))]
        hint = f"did you mean {' or '.join(alike)}? The known are " if alike else "the known are "
        raise ValueError(
            f"{name!r} is no device that the planner has numbers of; {hint}{', '.join(KNOWN_DEVICES)}. On the "
            "machine itself `lightning-memopt doctor` measures them"
        )
    return KNOWN_DEVICES[key]
