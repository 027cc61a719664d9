"""Recipes of compression on trained models: bytes, what the metric loses, and speed, beside other libraries'.

    python benchmarks/compression.py                        # all tasks and recipes, about an hour on 2 cores
    python benchmarks/compression.py --only digits_cnn.nf4  # one row, merged into the results
    python benchmarks/compression.py --quick --out x.json   # toy sizes: does it run?

The tasks are in ``compression_tasks.py``, the recipes and their targets in ``compression_recipes.py``.
"""

import logging
import sys
import warnings
from pathlib import Path
from time import process_time
from typing import Any

import lightning.pytorch as pl
import torch
import torch._inductor.config
from compression_recipes import RECIPES, Recipe
from compression_tasks import Task, tasks
from environment import environment_record, now
from options import Options, open_results
from safetensors.torch import load_model, save_model

from lightning_memopt.compression.latency import compare_latency
from lightning_memopt.compression.sizes import measure_sizes

RESULTS = Path(__file__).parent / "results" / "compression.json"


def main() -> int:
    options = _options().parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found = tasks(options.quick)
    order = [f"{task}.{name}" for task in found for name, one in RECIPES.items() if task in (one.tasks or found)]
    wanted = options.only or order
    if unknown := set(wanted) - set(order):
        print(f"{', '.join(sorted(unknown))}: no such row; there are {', '.join(order)}", file=sys.stderr)
        return 2
    sizes = "toy" if options.quick else "full"
    time_method = f"Speed is the median ratio of {options.runs} pairs of neighbouring runs."
    header = {"environment": environment_record(), "sizes": sizes, "time_method": time_method}
    results = open_results(options.out, header)
    failed = False
    for name, task in found.items():
        rows = [row for row in wanted if row.startswith(f"{name}.")]
        if not rows:
            continue
        module = _trained(task, options.weights)
        score = task.score(module)
        for row in rows:
            recipe = RECIPES[row.split(".")[1]]
            try:
                record = _measure(task, module, score, recipe, options.runs)
            except Exception as error:
                record = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
                failed |= recipe.is_ours
            record = {"task": name, "title": recipe.title, "is_ours": recipe.is_ours} | record
            results.add(row, record | {"measured_at": now()}, order)
            print(row, {key: value for key, value in record.items() if key not in ("task", "title")}, flush=True)
    return 1 if failed else 0


def _trained(task: Task, folder: Path | None) -> pl.LightningModule:
    """The task's module after its training, or with the weights that an earlier run left in ``folder``."""
    pl.seed_everything(0, verbose=False)  # the same module, whichever rows are asked for
    module = task.build()
    path = folder and folder / f"{task.name}.safetensors"
    if path and path.exists():
        load_model(module, path)
        return module
    task.fit(module, task.epochs)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(module, str(path))
    return module


def _measure(task: Task, module: pl.LightningModule, score: float, recipe: Recipe, runs: int) -> dict[str, Any]:
    outcome = recipe.run(task, module)
    dense = measure_sizes(module, packed=False)
    held = sum(size.bytes for size in dense.values())
    disk = sum(size.disk_bytes for size in dense.values())
    now_held = sum(size.bytes for size in measure_sizes(outcome.module, packed=False).values())
    after = task.score(outcome.module)
    record: dict[str, Any] = {
        "bytes_before": disk,
        "disk_ratio": outcome.disk_bytes / disk,
        "memory_ratio": now_held / held,
        "metric": task.metric,
        "metric_before": score,
        "metric_after": after,
        "drop": task.drop(score, after),
        "notes": outcome.notes,
        "clock": "processor time",
    }
    first, second = (one.eval() for one in (task.copy(module), task.copy(outcome.module)))
    torch.compiler.reset()
    # Each size of a batch is compiled by itself: this is about the best that either can do.
    before, small = first.forward, second.forward
    if recipe.is_compiled:
        before, small = torch.compile(before, dynamic=False), torch.compile(small, dynamic=False)
    for size in (1, 32):
        with torch.no_grad():
            before(task.batch(size))  # compiled before the option below is set
        with torch._inductor.config.patch(freezing=recipe.is_frozen):
            latency = compare_latency(before, small, task.batch(size), size, runs=runs, clock=process_time)
        record[f"speedup_at_{size}"] = latency.speedup
        record[f"seconds_at_{size}"] = [latency.before_seconds, latency.after_seconds]
    return record | _verdict(recipe, record, task.is_accuracy)


def _verdict(recipe: Recipe, record: dict[str, Any], is_accuracy: bool) -> dict[str, Any]:
    drop = recipe.drop_target if is_accuracy else recipe.perplexity_target or recipe.drop_target
    targets = {"disk_ratio": recipe.size_target, "drop": drop, "speedup_at_32": recipe.speed_target}
    met = [
        record[key] >= target if key == "speedup_at_32" else record[key] <= target
        for key, target in targets.items()
        if target is not None
    ]
    return {"targets": targets, "met": all(met) if met else None}


def _options() -> Options:
    options = Options(__doc__, RESULTS)
    options.add_count("runs", 50, "pairs of runs that a speedup is the median of")
    options.parser.add_argument(
        "--weights", type=Path, help="keep what was trained in this folder, and take it from there"
    )
    return options


if __name__ == "__main__":
    raise SystemExit(main())
