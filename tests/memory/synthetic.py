"""Reports with known figures, shaped like a transformer's step."""

from lightning_memopt.memory.report import CATEGORIES, MemoryReport, TimelinePoint

MIB = 2**20


def report_of_a_step(
    layers: int = 12,
    activations_per_layer: int = 64 * MIB,
    points_per_layer: int = 6,
    micro_batches: int = 1,
    source: str = "measured",
) -> MemoryReport:
    """Activations rise in the forward and fall in the backward while gradients rise; parameters are 36 MiB."""
    fixed = {"parameters": 36 * MIB, "optimizer_state": 72 * MIB, "buffers": 1 * MIB, "other": 2 * MIB}
    count = layers * points_per_layer
    timeline = [TimelinePoint("other", "", fixed)]

    def point(phase, done, gradients, activations, temporaries=0):
        block = f"model.h.{min(layers - 1, done // points_per_layer)}"
        used = fixed | {"gradients": gradients, "activations": activations, "temporaries": temporaries}
        return TimelinePoint(phase, block, {name: used.get(name, 0) for name in CATEGORIES})

    whole = layers * activations_per_layer
    for micro_batch in range(micro_batches):
        full_gradients = 36 * MIB if micro_batch else 0
        timeline += [point("forward", i, full_gradients, whole * i // count, (i % 3) * 4 * MIB) for i in range(count)]
        for i in range(count):
            gradients = full_gradients or 36 * MIB * i // count
            timeline.append(
                point("backward", count - i - 1, gradients, whole * (count - i) // count, (i % 4) * 5 * MIB)
            )
    timeline += [point("step", 0, 36 * MIB, 0, (i % 5) * 7 * MIB) for i in range(8)]
    peak = max(timeline, key=lambda p: p.total_bytes)
    by_submodule = {f"model.h.{i}": 4 * MIB + whole // layers for i in range(layers)}
    by_submodule[""] = peak.total_bytes - sum(by_submodule.values())
    return MemoryReport(peak.total_bytes, peak.by_category, by_submodule, tuple(timeline), source)
