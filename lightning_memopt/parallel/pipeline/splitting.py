"""Cut the chain into stages, and find which stages hold each parameter and buffer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_memopt.models.ties import find_tied_parameters
from lightning_memopt.parallel.pipeline.probe import Survey

Split = Literal["auto", "measured"] | int | Sequence[str]
"""``"auto"`` and a number of stages balance what is counted, ``"measured"`` what is timed; or the names of the
modules that stages after the first begin with."""


@dataclass(frozen=True)
class Partition:
    """How the chain is cut.

    Attributes:
        names: The links of the chain.
        starts: The link that each stage begins with; the first stage's is 0, and has all that comes before it too.
        costs: Of each stage, in the unit of the survey's.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]
    costs: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def links_of(self, stage: int) -> range:
        """The links of ``stage``."""
        end = self.starts[stage + 1] if stage + 1 < len(self) else len(self.names)
        return range(self.starts[stage], end)

    def stage_of(self, position: int) -> int:
        """The stage that runs ``position`` (see :class:`~...probe.Survey`)."""
        link = max(position - 1, 0)
        return max(stage for stage, start in enumerate(self.starts) if start <= link)


def number_of_stages(split: Split, ranks: int, each: int) -> int:
    """How many stages ``split`` makes.

    Args:
        split: What the user asked for.
        ranks: Ranks of the pipeline.
        each: Stages on a rank, as the schedule needs.

    Raises:
        ValueError: Another number than the ranks and the schedule need.
    """
    wanted = ranks * each
    if isinstance(split, str):
        return wanted
    given = split if isinstance(split, int) else len(split) + 1
    if given % ranks or (each == 1 and given != ranks) or given < wanted or (each == 2 and given != wanted):
        raise ValueError(
            f"split={split!r} makes {given} stages, and {ranks} ranks with this schedule need {wanted}"
            + ("" if each == 1 else f", {each} on each")
            + f"; give {wanted - 1} names, the number {wanted}, or 'auto'."
        )
    return given


def partition(survey: Survey, split: Split, stages: int) -> Partition:
    """Choose the cuts: the given ones, or those for which the most expensive stage costs least.

    Raises:
        ValueError: More stages than links, a name that is none, or no cut where one is needed; says why.
    """
    names = survey.names
    if stages > len(names):
        raise ValueError(
            f"{stages} stages are asked for, and there are {len(names)} modules to cut before (`{names[0]}` to "
            f"`{names[-1]}`); use at most {len(names)} stages."
        )
    starts = _balanced(survey, stages) if isinstance(split, int | str) else _given(survey, split)
    ends = (*starts[1:], len(names))
    costs = [sum(survey.costs[start + 1 : end + 1]) for start, end in zip(starts, ends, strict=True)]
    costs[0] += survey.costs[0]
    return Partition(tuple(names), starts, tuple(costs))


def _given(survey: Survey, split: Sequence[str]) -> tuple[int, ...]:
    starts = [0]
    for name in split:
        if name not in survey.names:
            raise ValueError(
                f"split has {name!r}, which is no module to cut before; there are {', '.join(survey.names)}."
            )
        start = survey.names.index(name)
        if start <= starts[-1]:
            raise ValueError(f"split has {name!r} out of order; the step calls {', '.join(survey.names)}.")
        if start in survey.uncut:
            raise ValueError(f"the step cannot be cut before `{name}`: {survey.uncut[start]}.")
        starts.append(start)
    return tuple(starts)


def _balanced(survey: Survey, stages: int) -> tuple[int, ...]:
    """By dynamic programming: ``best[start]`` of the chain cut into so many stages up to ``start``."""
    count = len(survey.names)
    allowed = [start for start in range(1, count) if start not in survey.uncut]
    if len(allowed) < stages - 1:
        reasons = next(iter(survey.uncut.values()))
        raise ValueError(
            f"{stages} stages are asked for, and the step can be cut in {len(allowed)} places: {reasons}, "
            "or use `memopt_zero3`."
        )
    sums = [0.0]
    for position in range(count):
        sums.append(sums[-1] + survey.costs[position + 1] + (survey.costs[0] if position == 0 else 0))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(1, stages + 1):
        ends = allowed if stage < stages else [count]
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in ends:
            options = [
                (max(cost, sums[end] - sums[start]), (*starts, start))
                for start, (cost, starts) in best.items()
                if start < end
            ]
            if options:
                following[end] = min(options)
        best = following
    return best[count][1]


def holders(module: nn.Module, survey: Survey, cut: Partition, stubs: dict[Tensor, Tensor]) -> dict[Tensor, set[int]]:
    """The stages that hold each parameter, and each buffer that belongs to a module with parameters.

    A parameter is held where it is used, one that the step does not use on every stage. Other buffers (position ids,
    rotary tables) are on every rank, which computes with them, unless they lie within the blocks of one stage.

    Args:
        module: The model.
        survey: Its uses are of stubs.
        cut: The stages.
        stubs: Of each parameter and buffer, its stub.
    """
    everywhere = set(range(len(cut)))
    found: dict[Tensor, set[int]] = {}
    tied = {name for names in find_tied_parameters(module) for name in names}
    for name, parameter in module.named_parameters():
        positions = survey.uses.get(stubs[parameter], set())
        found[parameter] = {cut.stage_of(position) for position in positions}
        if not survey.is_whole and (not positions or name in tied):
            found[parameter].add(len(cut) - 1)  # behind the last block, where the run stopped
        if not found[parameter]:
            found[parameter] = _stage_of_link(name, cut) or everywhere
    inside: dict[Tensor, list[set[int]]] = {}  # of each buffer, by every name that it has
    for name, owner in module.named_modules(remove_duplicate=False):
        for buffer in owner.buffers(recurse=False):
            inside.setdefault(buffer, []).append(_stage_of_link(f"{name}.", cut))
    for owner in module.modules():
        own = [found[parameter] for parameter in owner.parameters(recurse=False)]
        for buffer in owner.buffers(recurse=False):
            if all(inside[buffer]) and len(set().union(*inside[buffer])) == 1:
                found[buffer] = inside[buffer][0]
            elif own:
                found[buffer] = found.get(buffer, set()).union(*own)
    return found


def _stage_of_link(name: str, cut: Partition) -> set[int]:
    return {cut.stage_of(i + 1) for i, link in enumerate(cut.names) if name.startswith(f"{link}.")}
