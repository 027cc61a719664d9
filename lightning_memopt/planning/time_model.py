"""Time of one step of one rank, from its operators and its collectives."""

from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.operators import Collective
from lightning_memopt.planning.roofline import Transfer, step_time
from lightning_memopt.planning.space import Choice
from lightning_memopt.planning.trace import StepTrace


def seconds_per_batch(trace: StepTrace, choice: Choice, device: DeviceModel, devices: int) -> dict[str, float]:
    """Seconds by part for one batch of the user's, of which a step of all ranks has several.

    Args:
        trace: Of one rank.
        choice: What was traced.
        device: What it runs on.
        devices: Devices of a node.
    """
    sizes = choice.layout.sizes
    transfers = [_transfer(each, devices) for each in trace.collectives]
    if choice.techniques.offload:
        held = max(point.by_category["activations"] for point in trace.points)
        transfers.append(Transfer("offload", held, times=2, is_overlapped=True))
    operators = list(trace.operators)
    on_host = 0.0
    if choice.layout.offloads:
        shards = max(point.by_category["parameters"] for point in trace.points)
        # Each shard is copied to the device for the forward and for the backward, and its gradient back.
        transfers.append(Transfer("offload", shards, times=3, is_overlapped=True))
        # Memory of the host, which all of its devices' ranks share, is taken for as fast for each as its link.
        steps = [call for call in operators if call.part == "optimizer"]
        on_host = sum(call.moved_bytes * call.times for call in steps) / device.host_link
        operators = [call for call in operators if call.part != "optimizer"]
    sharing = min(sizes.world, devices) if device.kind == "cpu" else 1
    time = step_time(operators, device, transfers=transfers, sharing=sharing)
    parts = time.parts | {"optimizer": time.optimizer + on_host}
    return {part: seconds / sizes.batches for part, seconds in parts.items()}


def _transfer(collective: Collective, devices: int) -> Transfer:
    nodes = len({rank // devices for rank in collective.ranks})
    return Transfer(
        collective.kind,
        collective.size_bytes,
        round(collective.times),
        len(collective.ranks),
        nodes,
        is_overlapped=not collective.waits,
    )
