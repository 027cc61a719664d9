"""How much each layer can bear, and the mixed recipe that follows from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_memopt.compression.quantize import Engine, GrowthError, Scheme, packing, quantize
from lightning_memopt.compression.ranges import Range
from lightning_memopt.compression.recipe import Recipe
from lightning_memopt.compression.selection import WeightFilter
from lightning_memopt.models.copying import copy_module
from lightning_memopt.models.selectors import Selector

Score = Callable[[nn.Module], float]
"""Gives the validation metric of a module."""


@dataclass(frozen=True)
class Trial:
    """One weight in one scheme, all others as they were.

    Attributes:
        weight: Qualified name of the parameter.
        scheme: Its scheme, ``None`` for as it was.
        drop: How much worse the metric became; negative where it became better.
        bytes: What the parameter takes.
    """

    weight: str
    scheme: Scheme | None
    drop: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`scan_sensitivity` found.

    Attributes:
        score: The metric of the module as it was.
        trials: By weight in the order of registration, by scheme in the order given, as it was first.
        mode: ``"max"`` where more of the metric is better, or ``"min"``.
        engine: What the weights were held by; see :func:`~lightning_memopt.compression.quantize.quantize`.
    """

    score: float
    trials: tuple[Trial, ...]
    mode: str = "max"
    engine: Engine = "memopt"

    def mixed(
        self,
        max_metric_drop: float,
        judge: Score,
        module: nn.Module,
        *,
        mode: str | None = None,
        input_ranges: Mapping[str, Range] | None = None,
    ) -> Recipe:
        """The recipe of fewest bytes whose measured drop is at most ``max_metric_drop``.

        All weights start at their fewest bytes. Drops are taken to add up, and the weight that gives back most of the
        metric for a byte is upgraded until the sum is within bounds; then the whole is measured, and upgrading goes
        on for as long as it is not. The result is measured, not promised; another recipe may take fewer bytes.

        Args:
            max_metric_drop: In the metric's own units.
            judge: Gives the metric of a module.
            module: The module that was scanned.
            mode: That of the scan, which holds where it is left out.
            input_ranges: As the scan was given.

        Returns:
            The recipe, of one step for each scheme in use.

        Raises:
            ValueError: No weight can be quantized within bounds, or ``mode`` is not that of the scan.
        """
        if mode not in (None, self.mode):
            raise ValueError(f"mode={mode!r} is not that of the scan, whose drops are by {self.mode!r}; scan again")
        options: dict[str, list[Trial]] = {}
        for trial in self.trials:
            options.setdefault(trial.weight, []).append(trial)
        ladders = {name: _ladder(found) for name, found in options.items()}
        chosen = dict.fromkeys(ladders, 0)
        while True:
            current = [ladders[name][step] for name, step in chosen.items()]
            schemes = list(dict.fromkeys(trial.scheme for trial in current if trial.scheme is not None))
            if not schemes:
                raise ValueError(
                    f"no weight of {type(module).__name__} can be quantized within max_metric_drop="
                    f"{max_metric_drop:g}; allow more, or scan schemes of more bits"
                )
            if sum(max(trial.drop, 0.0) for trial in current) <= max_metric_drop:
                recipe = _recipe(current, schemes, self.engine)
                trial_module = copy_module(module)
                recipe.apply(trial_module, input_ranges=input_ranges)
                if _worse(self.score, judge(trial_module), self.mode) <= max_metric_drop:
                    return recipe
            name = max(
                (name for name, step in chosen.items() if step + 1 < len(ladders[name])),
                key=lambda name: _gain(ladders[name], chosen[name]),
            )
            chosen[name] += 1


def scan_sensitivity(
    module: nn.Module,
    judge: Score,
    schemes: Sequence[Scheme] = ("int8", "nf4"),
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    mode: str = "max",
    input_ranges: Mapping[str, Range] | None = None,
    engine: Engine = "memopt",
) -> Sensitivity:
    """Quantize one weight at a time and measure.

    Takes one evaluation for each weight and scheme, and the memory of one more module.

    Args:
        module: A trained module; it is only read.
        judge: Gives the metric of a module, such as
            ``lambda module: trainer.validate(module, loader)[0]["val_accuracy"]``.
        schemes: What to try; see :func:`~lightning_memopt.compression.quantize.quantize`.
        include: Only these weights: names, patterns or classes of modules. ``None``: all.
        exclude: Not these.
        mode: ``"max"`` where more of the metric is better, or ``"min"``.
        input_ranges: For ``"int8_static"``; see :func:`~lightning_memopt.compression.quantize.quantize`.
        engine: Likewise.

    Raises:
        ValueError: ``mode`` or a scheme is unknown, or no weight is chosen.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64))
        >>> found = scan_sensitivity(net, lambda net: float(net[0].weight.std()), ["int8"])
        >>> [(trial.weight, trial.scheme) for trial in found.trials]
        [('0.weight', None), ('0.weight', 'int8')]
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r} is neither 'max' nor 'min'")
    for scheme in schemes:
        packing(scheme, engine)  # says what is unknown before hours of validation
    score = judge(module)
    trials: list[Trial] = []
    for weight in WeightFilter(include, exclude, embeddings=True).select(module).weights:
        trials.append(Trial(weight.name, None, 0.0, weight.parameter.nbytes))
        for scheme in schemes:
            changed = copy_module(module)
            try:
                only = WeightFilter(weight.name, embeddings=True)
                done = quantize(changed, scheme, only, input_ranges, engine=engine)
            except GrowthError:  # a weight too small to gain by it
                continue
            drop = _worse(score, judge(changed), mode)
            saved = done.bytes_before - done.bytes_after
            trials.append(Trial(weight.name, scheme, drop, weight.parameter.nbytes - saved))
    return Sensitivity(score, tuple(trials), mode, engine)


def _worse(before: float, after: float, mode: str) -> float:
    return before - after if mode == "max" else after - before


def _ladder(options: list[Trial]) -> list[Trial]:
    """From the fewest bytes upward, only those that lose less than what is smaller."""
    ladder: list[Trial] = []
    for trial in sorted(options, key=lambda trial: trial.bytes):
        if not ladder or max(trial.drop, 0.0) < max(ladder[-1].drop, 0.0) or trial.scheme is None:
            ladder.append(trial)
    return ladder


def _gain(ladder: list[Trial], step: int) -> float:
    """What the next step gives back of the metric for each byte that it takes."""
    here, upward = ladder[step], ladder[step + 1]
    return (max(here.drop, 0.0) - max(upward.drop, 0.0)) / max(upward.bytes - here.bytes, 1)


def _recipe(current: list[Trial], schemes: list[Scheme], engine: Engine) -> Recipe:
    steps: list[dict[str, Any]] = [
        {"scheme": scheme, "engine": engine, "include": [trial.weight for trial in current if trial.scheme == scheme]}
        for scheme in schemes
    ]
    return Recipe.from_dict({"quantize": steps})
