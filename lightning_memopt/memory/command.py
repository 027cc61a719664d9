"""``lightning-memopt report``: predicted against measured for a run that is over."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_memopt.memory.report import MemoryReport

MEASURED, PREDICTED = "memory_report.json", "memory_predicted.json"
"""What the monitor writes into its folder: what it measured, and what it was given as the prediction."""

PLANNED = "memory_plan.json"
"""What a run that planned for itself writes: its plans, which was chosen, and the peak that was measured."""


def add_parser(commands: Any) -> None:
    """Add ``report`` to the command line; torch is imported when it runs, so that ``--help`` is quick."""
    parser = commands.add_parser(
        "report",
        help="compare what a finished run was predicted to use with what it used",
        description="Compare predicted with measured memory for each run under DIR that had a MemoryMonitor or a "
        "MemoryPlan (as memopt_auto has).",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the folder of a run, or of several")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0, or 2 with one line that says what is not there."""
    try:
        runs, plans = _read_runs(options.directory), _read_plans(options.directory)
        if not runs and not plans:
            missing = "has no" if options.directory.is_dir() else "is no folder; a run's has a"
            raise ValueError(
                f"{options.directory} {missing} {MEASURED}, which MemoryMonitor writes when a run ends, and no "
                f"{PLANNED}, which MemoryPlan writes"
            )
    except (OSError, ValueError) as error:
        print(f"lightning-memopt report: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([*(_as_dict(folder, *reports) for folder, reports in runs.items()), *plans], indent=1))
        return 0
    for plan in plans:
        _show_plan(plan)
    for folder, reports in runs.items():
        _show(folder, *reports)
    return 0


Run = tuple["MemoryReport", "MemoryReport | None"]
"""What was measured, and what was predicted where that was kept."""


def _read_runs(directory: Path) -> dict[Path, Run]:
    """Runs by folder.

    Raises:
        ValueError: A file holds something else.
        OSError: A file cannot be read.
    """
    measured = sorted(directory.rglob(MEASURED)) if directory.is_dir() else []
    return {path.parent: (_read(path), _read_if_there(path.with_name(PREDICTED))) for path in measured}


def _read(path: Path) -> "MemoryReport":
    from lightning_memopt.memory.report import MemoryReport

    try:
        return MemoryReport.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not what MemoryMonitor wrote ({error}); run it again") from error


def _read_plans(directory: Path) -> list[dict[str, Any]]:
    """What runs planned and measured, as :func:`_as_dict` gives it, with what was ``"chosen"``.

    Raises:
        ValueError: A file holds something else.
        OSError: A file cannot be read.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(directory.rglob(PLANNED)) if directory.is_dir() else []:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            plan, measured_bytes = said["plans"][said["chosen"]], int(said["measured_bytes"])
            categories = {name: int(size) for name, size in plan["by_category"].items() if name != "workspace"}
            names = [callback["class_path"].rpartition(".")[2] for callback in plan["callbacks"]]
            found.append(
                {
                    "folder": str(path.parent),
                    "chosen": ", ".join([plan["strategy"], *names]),
                    "measured": {"peak_bytes": measured_bytes},
                    # What libraries hold is beside the allocator that measures.
                    "predicted": {"peak_bytes": sum(categories.values()), "by_category": categories},
                    "error": _error(measured_bytes, sum(categories.values())),
                }
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{path} is not what MemoryPlan wrote ({type(error).__name__}: {error}); run it again"
            ) from error
    return found


def _read_if_there(path: Path) -> "MemoryReport | None":
    return _read(path) if path.exists() else None


def _error(measured_bytes: int, predicted_bytes: int) -> float | None:
    return predicted_bytes / measured_bytes - 1 if measured_bytes else None


def _as_dict(folder: Path, measured: "MemoryReport", predicted: "MemoryReport | None") -> dict[str, Any]:
    found: dict[str, Any] = {"folder": str(folder), "device": measured.device}
    for name, report in (("measured", measured), ("predicted", predicted)):
        found[name] = report and {"peak_bytes": report.peak_bytes, "by_category": dict(report.by_category)}
    found["error"] = predicted and _error(measured.peak_bytes, predicted.peak_bytes)
    return found


def _show_plan(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from lightning_memopt.memory.report import format_bytes

    table = Table("plan", title=plan["folder"])
    for heading in ("measured", "predicted", "error"):
        table.add_column(heading, justify="right")
    peaks = [format_bytes(plan[each]["peak_bytes"]) for each in ("measured", "predicted")]
    table.add_row(plan["chosen"], *peaks, "" if plan["error"] is None else f"{plan['error']:+.1%}")
    Console().print(table)


def _show(folder: Path, measured: "MemoryReport", predicted: "MemoryReport | None") -> None:
    from rich.console import Console
    from rich.table import Table

    from lightning_memopt.memory.report import CATEGORIES, format_bytes

    table = Table("at the peak", title=str(folder))
    for heading in ("measured", *(("predicted", "error") if predicted else ())):
        table.add_column(heading, justify="right")
    rows = [
        (name, measured.by_category.get(name, 0), (predicted or measured).by_category.get(name, 0))
        for name in CATEGORIES
    ]
    rows = [row for row in rows if row[1] or row[2]]
    rows.append(("all", measured.peak_bytes, (predicted or measured).peak_bytes))
    for name, used, expected in rows:
        error = _error(used, expected)
        beside = (format_bytes(expected), "" if error is None else f"{error:+.1%}") if predicted else ()
        table.add_row(name, format_bytes(used), *beside)
    console = Console()
    console.print(table)
    if predicted is None:
        console.print("No prediction was kept: give one as MemoryMonitor(predicted=predict_memory(module, batch)).")
    for note in dict.fromkeys((*measured.notes, *(predicted.notes if predicted else ()))):
        console.print(f"Note: {note}", highlight=False, markup=False)
