"""Time of one step of all ranks, from the operators and the collectives of those that were traced."""

from dataclasses import replace

from lightning_memopt.parallel.pipeline.timing import pipeline_time
from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.operators import Collective
from lightning_memopt.planning.roofline import StepTime, Transfer, busy_seconds, step_time, transfer_seconds
from lightning_memopt.planning.space import Choice
from lightning_memopt.planning.stages import SCHEDULE
from lightning_memopt.planning.trace import StepTrace


def seconds_per_batch(trace: StepTrace, choice: Choice, device: DeviceModel, devices: int) -> dict[str, float]:
    """Seconds by part for one batch of the user's, of which a step of all ranks has several.

    Args:
        trace: Of one rank, or of the stages of a pipeline.
        choice: What was traced.
        device: What it runs on.
        devices: Devices of a node.
    """
    if trace.stages is None:
        parts = _of_rank(trace, choice, device, devices).parts
    else:
        parts = _of_pipeline(trace, choice, device, devices).parts
    return {part: seconds / choice.layout.sizes.batches for part, seconds in parts.items()}


def _of_rank(trace: StepTrace, choice: Choice, device: DeviceModel, devices: int) -> StepTime:
    transfers = [_transfer(each, devices) for each in trace.collectives if each.kind != "send"]
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
    time = step_time(
        operators, device, transfers=transfers, sharing=_sharing(choice, device, devices),
        recompute_overhead=_recompute_overhead(choice, device),
    )  # fmt: skip
    # A GPU is still busy with the micro-batch before while its host prepares the next.
    looping = device.micro_batch_overhead * trace.micro_batches if device.kind == "cpu" else 0.0
    return replace(time, compute=time.compute + looping, optimizer=time.optimizer + on_host)


def _of_pipeline(trace: StepTrace, choice: Choice, device: DeviceModel, devices: int) -> StepTime:
    """The actions of all stages in the order of the schedule; what stages wait for is idle, or communication.

    Of stages that differ the mean computes for so long: the others wait for the slowest.
    """
    stages, sizes = trace.stages, choice.layout.sizes
    assert stages is not None
    sharing, count = _sharing(choice, device, devices), stages.microbatches
    again_overhead = _recompute_overhead(choice, device)
    busy = {stage: busy_seconds(of.operators, device, sharing, again_overhead) for stage, of in stages.traces.items()}
    forward = stages.by_stage({stage: of["forward"] / count for stage, of in busy.items()})
    recompute = stages.by_stage({stage: of["recompute"] / count for stage, of in busy.items()})
    backward = stages.by_stage({stage: of["backward"] / count for stage, of in busy.items()})
    again = [seconds + more for seconds, more in zip(backward, recompute, strict=True)]
    is_across = sizes.world > devices
    sends = [each for each in stages.traces[0].collectives if each.kind == "send"]
    one = [Transfer("send", each.size_bytes, ranks=2, nodes=1 + is_across) for each in sends]
    send = sum(transfer_seconds(of, device) * each.times for of, each in zip(one, sends, strict=True)) / count
    played, at_once = (
        pipeline_time(SCHEDULE, sizes.pipeline, count, forward, again, send=seconds) for seconds in (send, 0.0)
    )
    computes = sum(at_once.busy) / sizes.pipeline
    recomputes = sum(recompute) * count / sizes.pipeline
    ranks = [_of_rank(of, choice, device, devices) for of in stages.traces.values()]
    return StepTime(
        compute=computes - recomputes,
        recompute=recomputes,
        optimizer=max(each.optimizer for each in ranks),
        communication=max(each.communication for each in ranks) + played.seconds - at_once.seconds,
        offload=max(each.offload for each in ranks),
        idle=at_once.seconds - computes,
    )


def _recompute_overhead(choice: Choice, device: DeviceModel) -> float | None:
    policy = choice.techniques.checkpointing
    return device.recompute_overheads.get("selective" if policy == "budget" else policy)  # both look at each call


def _sharing(choice: Choice, device: DeviceModel, devices: int) -> int:
    """How many ranks compute on one device at once, as those of a CPU do."""
    return min(choice.layout.sizes.world, devices) if device.kind == "cpu" else 1


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
