"""Print a tensor parallel plan: what is split how, what was found out about it, and the bytes on each rank."""

from collections.abc import Iterable

from lightning_memopt.parallel.tensor.plan import PlanEntry, TensorPlan
from lightning_memopt.parallel.tensor.regions import Region


def describe_plan(plan: TensorPlan, regions: Iterable[Region] = ()) -> str:
    """A table with a line for each module that holds parameters.

    Args:
        plan: What was planned.
        regions: The groups of a module that was split, of which more is known: whether what lies between their
            layers is gathered, and why.
    """
    by_layer = {name: region for region in regions for name in region.group.names}
    rows = [("module", "style", "bytes", "on a rank", "")]
    rows += [
        (e.name or "(itself)", e.style, f"{e.whole_bytes:,}", f"{e.rank_bytes:,}", _remark(e, by_layer.get(e.name)))
        for e in plan.entries.values()
    ]
    whole, rank = (sum(getattr(e, k) for e in plan.entries.values()) for k in ("whole_bytes", "rank_bytes"))
    rows.append(
        ("sum of parameters", "", f"{whole:,}", f"{rank:,}", f"{rank / max(whole, 1):.1%} on each of {plan.size}")
    )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
        for a, b, c, d, e in rows
    )


def _remark(entry: PlanEntry, region: Region | None) -> str:
    if entry.style == "whole":
        return entry.reason
    if region is None:
        remark = {"colwise": "outputs gathered", "channels": "outputs gathered", "rowwise": "inputs taken apart"}.get(
            entry.style, ""
        )
        return f"{remark}: {entry.reason}" if remark and entry.reason else remark
    owner = f"`{region.group.owner or 'the module'}`"
    return f"split through {owner}" if region.is_local else f"gathered in {owner}: {region.reason}"
