"""Is the planner right: predicted against measured memory and time of every plan, and its choice against the best.

    python benchmarks/planner.py                       # hours on 2 cores; what is known already is left
    python benchmarks/planner.py --only memory/gpt2    # one row, measured again
    python benchmarks/planner.py --quick --out x.json  # does it run?

``memory``: of each module of the zoo, plans of one device as the planner's space has them, predicted and measured by
the allocator's events. ``choice``: six modules of some size under three budgets each, with every plan of the space's
first group measured, so that the best of them is known. The chosen one, be it one of them or not, is compared with
it, and the order of predicted times with that of measured ones. Times are of the process's own work on one thread (a
shared machine's other work is not counted): the least of the medians of rounds that take the plans in turn.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from environment import environment_record, now
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from options import Options, open_results
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from planner_modules import SIZED

import lightning_memopt as memopt
from lightning_memopt.planning.device_cache import this_device
from lightning_memopt.planning.read_module import read_space
from lightning_memopt.planning.search import Refused
from lightning_memopt.planning.space import Choice, Layout
from lightning_memopt.planning.time_model import seconds_per_batch
from lightning_memopt.planning.trace import StepTrace, StepTracer
from tests.zoo import ZOO

RESULTS = Path(__file__).parent / "results" / "planner.json"
ROWS = [*(f"memory/{name}" for name in ZOO), *(f"choice/{name}" for name in SIZED)]
QUICK_ROWS = ("memory/mlp", "choice/mlp")
BUDGETS = (0.9, 0.65, 0.45)
"""Fractions of the plain peak."""


class _Clock(pl.Callback):
    """Processor seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._begin)


def choices_of(module: pl.LightningModule, batch: Any, most: int) -> list[Choice]:
    """Choices of one device, spread evenly over the space."""
    space = read_space(module, batch, "32-true", {})
    found = [choice for tier in space.tiers([Layout()], exact=False) for choice in tier]
    step = max(1, len(found) // most)
    return found[::step][:most]


def exact_choices_of(module: pl.LightningModule, batch: Any) -> list[Choice]:
    """The first group of the space: all that keeps the numbers."""
    return next(iter(read_space(module, batch, "32-true", {}).tiers([Layout()], exact=True)))


def traced(tracer: StepTracer, choice: Choice) -> StepTrace | None:
    try:
        return tracer.trace(choice)
    except Refused:
        return None


def measured_bytes(build: Callable[[], pl.LightningModule], batch: Any, choice: Choice) -> int | None:
    techniques = choice.techniques
    try:
        return memopt.measure_memory(
            build(), batch, callbacks=techniques.callbacks("cpu"), precision=techniques.precision
        ).peak_bytes
    except (MisconfigurationException, RuntimeError):
        return None


def measured_seconds(build: Callable[[], pl.LightningModule], batch: Any, choice: Choice, steps: int) -> float:
    clock = _Clock()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*choice.techniques.callbacks("cpu"), clock],
    )  # fmt: skip
    trainer.fit(build(), DataLoader([batch] * steps, batch_size=None))
    return statistics.median(clock.seconds[2:])


def memory_row(name: str, plans: int) -> dict[str, Any]:
    entry = ZOO[name]
    module, batch = entry.build(), entry.batch()
    tracer = StepTracer(module, module, batch, {})
    rows = []
    for choice in choices_of(module, batch, plans):
        trace = traced(tracer, choice)
        measured = None if trace is None else measured_bytes(entry.build, batch, choice)
        if trace is not None and measured is not None:
            rows.append({"plan": str(choice.techniques), "predicted": trace.peak.total_bytes, "measured": measured})
    errors = [row["predicted"] / row["measured"] - 1 for row in rows]
    return {
        "plans": rows,
        "mean_error": statistics.fmean(map(abs, errors)),
        "worst_error": max(map(abs, errors)),
        "most_under": -min(0.0, *errors),
    }


def choice_row(name: str, rounds: int, most: int | None) -> dict[str, Any]:
    entry = SIZED[name]
    module, batch = entry.build(), entry.batch()
    device = this_device()
    tracer = StepTracer(module, module, batch, {})
    known: dict[Choice, tuple[int, float]] = {}

    def look_at(choice: Choice) -> None:
        trace = traced(tracer, choice)
        measured = None if trace is None else measured_bytes(entry.build, batch, choice)
        if trace is not None and measured is not None:
            known[choice] = (measured, sum(seconds_per_batch(trace, choice, device, 1).values()))

    for choice in exact_choices_of(module, batch)[:most]:
        look_at(choice)
    space, plain = list(known), max(size for size, _ in known.values())
    chosen: dict[float, Choice | None] = {}
    for fraction in BUDGETS:
        result = memopt.plan(entry.build(), batch, budget=int(plain * fraction), device=device, exact=True)
        chosen[fraction] = best = None if result.best is None else result.best.choice
        if best is not None and best not in known:  # one that keeps a part of the activations, or offloads
            look_at(best)
    times: dict[Choice, list[float]] = {choice: [] for choice in known}
    for _ in range(rounds):
        for choice in known:
            times[choice].append(measured_seconds(entry.build, batch, choice, 6))
    seconds = {choice: min(taken) for choice, taken in times.items()}
    budgets = {}
    for fraction, best in chosen.items():
        fitting = [choice for choice in space if known[choice][0] <= plain * fraction]
        quickest = min(fitting, key=lambda each: seconds[each], default=None)
        budgets[str(fraction)] = {
            "fits": quickest is None if best is None else known[best][0] <= plain * fraction,
            "time_to_best": None if best is None or quickest is None else seconds[best] / seconds[quickest],
            "chosen": None if best is None else str(best.techniques),
            "best": None if quickest is None else str(quickest.techniques),
        }
    return {
        "budgets": budgets,
        "plans": [
            {
                "plan": str(choice.techniques),
                "bytes": known[choice][0],
                "predicted_seconds": known[choice][1],
                "measured_seconds": seconds[choice],
            }
            for choice in space
        ],
        "rank_correlation": spearman([known[each][1] for each in space], [seconds[each] for each in space]),
    }


def spearman(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation: that of the places in the two orders."""
    places = torch.tensor([[sorted(values).index(value) for value in values] for values in (first, second)]).float()
    return float(torch.corrcoef(places)[0, 1])


def main() -> None:
    options = Options(__doc__, RESULTS, ROWS).parse()
    results = open_results(options.out, {"environment": environment_record(), "quick": options.quick})
    for row in options.only or (QUICK_ROWS if options.quick else ROWS):
        if row in results.rows and not options.only:
            continue
        figure, _, name = row.partition("/")
        if figure == "memory":
            made = memory_row(name, plans=4 if options.quick else 12)
        else:
            quick = options.quick
            made = choice_row(name, rounds=1 if quick else 2, most=4 if quick else None)
        results.add(row, made | {"measured_at": now()}, ROWS)
        print(row, {key: value for key, value in made.items() if key != "plans"}, flush=True)


if __name__ == "__main__":
    main()
