"""``memopt.plan``: which techniques make a module fit a budget, the fastest first."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.callbacks import Callback

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.models.blocks import find_block_stacks
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.planning import written
from lightning_memopt.planning.device_cache import this_device
from lightning_memopt.planning.devices import DeviceModel, device_model
from lightning_memopt.planning.estimates import Estimates
from lightning_memopt.planning.expectations import Expectations
from lightning_memopt.planning.explain import explain
from lightning_memopt.planning.host_limits import host_limit_bytes
from lightning_memopt.planning.memory_model import host_bytes, rank_peak
from lightning_memopt.planning.predict import Module, _check_batch
from lightning_memopt.planning.read_module import (
    can_be_copied,
    check_budget,
    ignores_unequal_targets,
    most_stages,
    read_space,
    without_memory,
)
from lightning_memopt.planning.refine import keep_what_fits
from lightning_memopt.planning.search import Evaluation, Found, Refused, find_smallest, may_fit, search
from lightning_memopt.planning.space import Choice, Layout, Space, find_layouts, widest_tensor
from lightning_memopt.planning.time_model import seconds_per_batch
from lightning_memopt.planning.trace import StepTracer
from lightning_memopt.planning.units import parse_bytes
from lightning_memopt.planning.values import line_of_step
from lightning_memopt.techniques.batches import batch_size


@dataclass(frozen=True)
class Plan:
    """One way to train.

    Attributes:
        choice: Where it runs and what is switched on.
        devices: Devices of a node.
        nodes: Nodes.
        device_kind: ``"cpu"`` or ``"cuda"``.
        peak_bytes: Predicted peak of a rank, with what libraries hold.
        by_category: The peak by category (:data:`~lightning_memopt.memory.report.CATEGORIES`) and, where there is
            any, ``"workspace"``; in bytes.
        relative_time: Time for one batch, as a multiple of the fastest choice's that was looked at.
        time_parts: The same by part; they sum to ``relative_time``.
        fits: Whether the peak is within the budget.
        bought: A sentence for each step from the plain loop to this plan, with what it saves and costs.
        trainer_options: The other arguments of the user's trainer, with which it was predicted.
    """

    choice: Choice
    devices: int
    nodes: int
    device_kind: str
    peak_bytes: int
    by_category: Mapping[str, int]
    relative_time: float
    time_parts: Mapping[str, float]
    fits: bool
    bought: tuple[str, ...] = ()
    trainer_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        """``Trainer(strategy=...)``."""
        return self.choice.layout.strategy

    @property
    def sizes(self) -> MeshSizes:
        """How many ways each kind of parallelism divides the ranks."""
        return self.choice.layout.sizes

    def callbacks(self) -> list[Callback]:
        """New callbacks of this plan."""
        return self.choice.techniques.callbacks(self.device_kind)

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of ``pl.Trainer`` that carry the plan out, beside those of yours that :func:`plan` was given."""
        arguments = {**written.trainer_arguments(self), "callbacks": self.callbacks()}
        if self.strategy == "memopt_hybrid":
            arguments["strategy"] = self.choice.layout.make_strategy()
        return arguments

    def python(self) -> str:
        """The trainer of this plan as Python to paste, with options of yours that are plain values."""
        return written.as_python(self)

    def yaml(self) -> str:
        """The trainer of this plan as YAML for ``LightningCLI``, with options of yours that are plain values."""
        return written.as_yaml(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return written.as_dict(self)


@dataclass(frozen=True)
class PlanResult:
    """What :func:`plan` found.

    Attributes:
        plans: Those that fit, the fastest first; then the fastest that do not, and the smallest of those.
        chosen: Index of the plan to take; ``None`` where nothing fits.
        budget_bytes: What each device may use.
        smallest_bytes: Where nothing fits, the smallest budget that would do on these devices.
        fewest_devices: Where nothing fits, how many devices of this budget would do, on all nodes together, if any
            number does.
        notes: What the predictions leave out.
    """

    plans: tuple[Plan, ...]
    chosen: int | None
    budget_bytes: int
    smallest_bytes: int | None = None
    fewest_devices: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def best(self) -> Plan | None:
        """The plan to take."""
        return None if self.chosen is None else self.plans[self.chosen]


def plan(
    module: Module,
    batch: Any,
    *,
    budget: int | str | None = None,
    devices: int = 1,
    nodes: int = 1,
    device: str | DeviceModel | None = None,
    precision: str = "32-true",
    wanted: int = 3,
    exact: bool = False,
    layouts: Sequence[Layout] | None = None,
    **trainer_options: Any,
) -> PlanResult:
    """Choose what to switch on so that ``module`` trains within ``budget`` as fast as it can.

    The step is predicted with each choice on (:func:`~lightning_memopt.predict_memory`), so the memory is that of
    the code that will run; the time follows from the operators of the same step. What changes the numbers (8-bit
    optimizer state, another precision) is considered only where nothing else fits.

    Args:
        module: A LightningModule, or a function that makes one, for models larger than this machine.
        batch: One batch as the training loader of one device gives it.
        budget: Memory of each device, as ``"24GiB"`` or in bytes; ``None`` is what ``device`` has, of this machine's
            CPU no more than limits leave to the process
            (:func:`~lightning_memopt.planning.host_limits.host_limit_bytes`).
        devices: Devices of each node.
        nodes: Nodes.
        device: A name that :func:`~lightning_memopt.planning.devices.device_model` knows, a model of your own, or
            ``None`` for the device of this machine.
        precision: The precision of your trainer.
        wanted: How many plans that fit to find.
        exact: Leave out what changes the numbers.
        layouts: The ways to spread a step that are looked at; by default those of so many devices and nodes.
        **trainer_options: Other arguments of your trainer, such as ``gradient_clip_val``.

    Returns:
        Plans that fit, the fastest first, and some that do not; ``pl.Trainer(**result.best.trainer_arguments())``
        trains by the one that was chosen.

    Raises:
        ValueError: No batch, an unknown device, a budget without a unit or below one block's parameters, or a step
            that fails or cannot be predicted.

    Example:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> result = plan(BoringModel(), torch.ones(4, 32), budget="2GiB", device="h100")
        >>> result.best.choice.techniques.checkpointing
        'none'
    """
    _check_batch(batch, "plan")
    model = device if isinstance(device, DeviceModel) else this_device() if device is None else device_model(device)
    budget_bytes = _memory_of(model, is_here=device is None) if budget is None else parse_bytes(budget)
    made = without_memory(module)
    layouts = layouts or find_layouts(
        devices, nodes, has_host=model.kind == "cuda", most_stages=most_stages(made, batch)
    )
    check_budget(
        made,
        budget_bytes,
        ways=max(layout.sizes.tensor for layout in layouts),
        least_itemsize=4 if exact and precision == "32-true" else 2,
    )
    space = read_space(made, batch, precision, trainer_options)
    traced = made if can_be_copied(made) else module
    tracer = StepTracer(traced, made, batch, trainer_options, model, with_values=module)
    blocks = [stack.name for stack in find_block_stacks(made)]
    planner = _Planner(tracer, space, blocks, model, devices, nodes, batch, trainer_options)
    return planner.run(budget_bytes, wanted, layouts, exact)


def _memory_of(model: DeviceModel, is_here: bool) -> int:
    limit = host_limit_bytes() if is_here and model.kind == "cpu" else None
    return model.memory_bytes if limit is None else min(model.memory_bytes, limit)


_NO_MICRO_BATCHES = (
    "micro-batches are left out: samples of the batch ignore unequal numbers of targets (-100), of which these would "
    "have to be told: MicroBatching(size, normalize='tokens', mask_key=...)"
)


class _Planner:
    """One run of :func:`plan`."""

    def __init__(
        self,
        tracer: StepTracer,
        space: Space,
        blocks: Sequence[str],
        device: DeviceModel,
        devices: int,
        nodes: int,
        batch: Any,
        trainer_options: Mapping[str, Any],
    ) -> None:
        self._tracer = tracer
        self._space = space
        self._blocks = blocks
        self._device = device
        self._devices = devices
        self._nodes = nodes
        self._trainer_options = trainer_options
        self._samples = batch_size(batch) if space.micro_batches else 1
        self._left_out = {_NO_MICRO_BATCHES} if ignores_unequal_targets(batch) else set()

    def run(self, budget_bytes: int, wanted: int, layouts: Sequence[Layout], exact: bool) -> PlanResult:
        plain = Choice(layouts[0], self._space.plain)
        first = self._evaluate_first(plain)
        # The scale of what is expected, and what is on in every choice that is looked at.
        base, usual = self._with_what_pays(plain, first)
        estimates = Estimates(self._tracer.trace(base), base.techniques, self._samples, self._blocks)
        estimates.learn(base, usual.by_category)
        expectations = Expectations(base, usual.total_seconds, self._samples)

        def evaluate(choice: Choice) -> Evaluation:
            evaluation = self._evaluate(choice)
            estimates.learn(choice, evaluation.by_category)
            expectations.learn(choice, evaluation.total_seconds)
            return evaluation

        found = Found({}, {}, {})
        for tier in self._space.tiers(layouts, exact):
            found |= search(
                tier,
                expectations,
                estimates,
                evaluate,
                budget_bytes,
                wanted=wanted,
            )
            if found.fitting and self._tracer.is_quick:
                found = keep_what_fits(found, evaluate, budget_bytes)
            if found.fitting:
                break
        else:
            found |= find_smallest(self._space.tiers(layouts, exact), estimates.least, evaluate)
        (found.too_large if first.peak_bytes > budget_bytes else found.fitting)[plain] = first
        fewest = None if found.fitting else self._fewest_devices(budget_bytes, estimates, exact)
        return self._result(found, budget_bytes, wanted, fewest)

    def _with_what_pays(self, plain: Choice, first: Evaluation) -> tuple[Choice, Evaluation]:
        """The plain choice, with the loss in chunks where that saves time as it does memory: then it is always on."""
        chunked = replace(plain, techniques=replace(plain.techniques, chunked_loss=True))
        if self._space.chunked_loss:
            try:
                evaluation = self._evaluate(chunked)
            except Refused:
                return plain, first
            if evaluation.total_seconds < first.total_seconds and evaluation.peak_bytes <= first.peak_bytes:
                self._space = replace(self._space, plain=chunked.techniques)
                return chunked, evaluation
        return plain, first

    def _evaluate_first(self, plain: Choice) -> Evaluation:
        """As ``_evaluate``; a step that fails as it is, before anything is switched on, fails by the user's line."""
        try:
            return self._evaluate(plain)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"one step of the module with this batch fails at {line_of_step(error)}, "
                f"with {type(error).__name__}: {error}; give a batch as the training loader gives it"
            ) from error

    def _evaluate(self, choice: Choice) -> Evaluation:
        trace = self._tracer.trace(choice)
        categories = rank_peak(trace, choice.layout, self._device)
        seconds = seconds_per_batch(trace, choice, self._device, self._devices)
        return Evaluation(sum(categories.values()), categories, seconds)

    def _result(self, found: Found, budget_bytes: int, wanted: int, fewest_devices: int | None) -> PlanResult:
        evaluations = found.fitting | found.too_large
        fastest = min(evaluation.total_seconds for evaluation in evaluations.values())
        too_large = sorted(found.too_large.items(), key=lambda item: item[1].total_seconds)
        smallest = min(too_large, key=lambda item: item[1].peak_bytes, default=None)
        shown = [item for item in too_large if item in too_large[:wanted] or item == smallest]
        ranked = [*list(found.fitting.items())[:wanted], *shown]
        plans = tuple(
            Plan(
                choice,
                self._devices,
                self._nodes,
                self._device.kind,
                evaluation.peak_bytes,
                evaluation.by_category,
                evaluation.total_seconds / fastest,
                {part: seconds / fastest for part, seconds in evaluation.seconds.items()},
                choice in found.fitting,
                explain(choice, evaluations),
                self._trainer_options,
            )
            for choice, evaluation in ranked
        )
        notes = tuple(sorted({note for choice, _ in ranked for note in self._notes(choice)} | self._left_out))
        if found.fitting:
            return PlanResult(plans, 0, budget_bytes, notes=notes)
        assert smallest is not None
        return PlanResult(plans, None, budget_bytes, smallest[1].peak_bytes, fewest_devices, notes)

    def _notes(self, choice: Choice) -> Iterator[str]:
        trace = self._tracer.trace(choice)
        yield from trace.notes
        if choice.layout.offloads:
            held = format_bytes(host_bytes(trace))
            yield f"under {choice.layout.strategy} a rank holds {held} in the host's memory"

    def _fewest_devices(self, budget_bytes: int, estimates: Estimates, exact: bool) -> int | None:
        """How many devices in all would do with everything sharded, a power of two times those there are."""
        candidates = [self._nodes * self._devices * 2**doublings for doublings in range(1, 7)]
        first_that_fits = bisect_left(
            candidates, True, key=lambda devices: self._fits_sharded(devices, budget_bytes, estimates, exact)
        )
        return candidates[first_that_fits] if first_that_fits < len(candidates) else None

    def _fits_sharded(self, devices: int, budget_bytes: int, estimates: Estimates, exact: bool) -> bool:
        """Whether everything that saves memory makes it fit where all ranks share all there is."""
        tensor = widest_tensor(self._devices)
        layouts = [Layout("memopt_zero3", MeshSizes(shard=devices))]
        if tensor > 1:
            layouts.append(Layout("memopt_hybrid", MeshSizes(shard=devices // tensor, tensor=tensor)))
        if self._device.kind == "cuda":
            layouts.append(Layout("memopt_zero3_offload", MeshSizes(shard=devices)))
        for layout in layouts:
            *_, last = self._space.tiers([layout], exact)
            # Gradients that add up over micro-batches may take more than the activations that these save.
            for choices in ([each for each in last if each.techniques.micro_batch is None], last):
                is_possible = min(map(estimates.least, choices)) <= budget_bytes
                if is_possible and may_fit(choices, self._evaluate, budget_bytes, Found({}, {}, {})):
                    return True
        return False


def describe_failure(result: PlanResult) -> str:
    """Why there is no plan, and what would make one, as a sentence."""
    devices = f"; {result.fewest_devices} such devices would do" if result.fewest_devices else ""
    assert result.smallest_bytes is not None
    return (
        f"nothing fits {format_bytes(result.budget_bytes)} a device: the smallest budget that would do is "
        f"{_bytes_that_do(result.smallest_bytes)}{devices}"
    )


def _bytes_that_do(count: int) -> str:
    """As :func:`~lightning_memopt.memory.report.format_bytes`, rounded up: what is said is given as a budget next."""
    said = format_bytes(count)
    if parse_bytes(said) >= count:
        return said
    number, unit = said.split()
    digits = len(number.partition(".")[2])
    return f"{float(number) + 10**-digits:.{digits}f} {unit}"
