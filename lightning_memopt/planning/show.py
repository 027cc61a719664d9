"""The plans as a table for people."""

from rich.table import Table

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.planning.plan import Plan, PlanResult

_PARTS = ("compute", "recompute", "optimizer", "communication", "offload", "idle")


def table(result: PlanResult) -> Table:
    """One row a plan: what it is, what a rank holds, and how long a step takes."""
    shown = Table(
        title=f"Plans for {format_bytes(result.budget_bytes)} a device", caption="time: a batch, fastest plan = 1"
    )
    for name in ("", "strategy", "techniques", "peak of a rank", "largest categories", "time", "of that"):
        # Folded where the terminal is narrow: a name that is cut off cannot be switched on.
        shown.add_column(name, justify="right" if name in ("peak of a rank", "time") else "left", overflow="fold")
    for index, plan in enumerate(result.plans):
        shown.add_row(
            "chosen" if index == result.chosen else "" if plan.fits else "too large",
            str(plan.choice.layout),
            _techniques(plan),
            format_bytes(plan.peak_bytes),
            _largest(plan),
            f"{plan.relative_time:.2f}",
            _parts(plan),
            style=None if plan.fits else "dim",
        )
    return shown


def _techniques(plan: Plan) -> str:
    words = [name for name, _ in plan.choice.techniques.written(plan.device_kind)]
    techniques = plan.choice.techniques
    policy = techniques.checkpointing if techniques.kept is None else f"budget={techniques.kept}"
    details = {"ActivationCheckpointing": policy, "MicroBatching": techniques.micro_batch}
    named = [f"{word}({details[word]})" if word in details else word for word in words]
    return ", ".join([techniques.precision, *named])


def _largest(plan: Plan) -> str:
    largest = sorted(plan.by_category.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in largest if size)


def _parts(plan: Plan) -> str:
    return ", ".join(
        f"{part} {plan.time_parts[part]:.2f}" for part in _PARTS if plan.time_parts.get(part, 0) >= 0.005
    )
