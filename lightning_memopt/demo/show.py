"""The demo's table, picture and JSON."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import lightning_memopt as memopt
from lightning_memopt.compression.report import CompressionReport
from lightning_memopt.demo.presets import Preset
from lightning_memopt.demo.run import Outcome
from lightning_memopt.memory.plots import plot_timelines
from lightning_memopt.memory.report import CATEGORIES, format_bytes

PICTURE = "timelines.png"
RESULTS = "results.json"


def table(plain: Outcome, other: Outcome, *, title: str) -> Table:
    """Both runs side by side: memory at the peak by category, time, loss, and the ratio of the second to the first.

    Args:
        plain: The run without techniques.
        other: The run with them.
        title: Printed above the table.
    """
    rows = Table(title=title, title_justify="left")
    for heading, justify in (
        ("", "left"),
        ("plain Lightning", "right"),
        (_heading(other), "right"),
        ("ratio", "right"),
    ):
        rows.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for category in CATEGORIES:
        pair = [outcome.measured.by_category.get(category, 0) for outcome in (plain, other)]
        if any(pair):
            rows.add_row(category.replace("_", " "), *_bytes_and_ratio(*pair))
    rows.add_section()
    rows.add_row("peak memory", *_bytes_and_ratio(plain.measured.peak_bytes, other.measured.peak_bytes), style="bold")
    rows.add_row("predicted peak", *_bytes_and_ratio(plain.predicted.peak_bytes, other.predicted.peak_bytes))
    rows.add_section()
    seconds = plain.seconds_per_step, other.seconds_per_step
    rows.add_row("time per step", *(f"{value:.3f} s" for value in seconds), _ratio(*seconds))
    losses = plain.validation_loss, other.validation_loss
    rows.add_row("validation loss (nats/byte)", *(f"{value:.4f}" for value in losses), _ratio(*losses, digits=4))
    return rows


def write_results(
    outcomes: Sequence[Outcome],
    folder: Path,
    *,
    compression: CompressionReport,
    preset_name: str,
    preset: Preset,
    steps: int,
    seed: int,
    seconds: float,
) -> Path:
    """Write what was run and found as JSON and return where it is."""
    record = {
        "preset": {"name": preset_name, **asdict(preset)},
        "steps": steps,
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning_memopt": memopt.__version__,
        },
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "runs": [_as_record(outcome) for outcome in outcomes],
        "compression": json.loads(compression.to_json()),
    }
    path = folder / RESULTS
    path.write_text(json.dumps(record, indent=1))
    return path


def write_picture(outcomes: Sequence[Outcome], folder: Path) -> Path | None:
    """Draw the timelines of all runs into one PNG; ``None`` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    return plot_timelines({outcome.name: outcome.measured for outcome in outcomes}, folder / PICTURE)


def _heading(outcome: Outcome) -> str:
    return "with " + "\n".join(outcome.techniques)


def _bytes_and_ratio(plain: int, other: int) -> tuple[str, str, str]:
    return format_bytes(plain), format_bytes(other), _ratio(plain, other)


def _ratio(plain: float, other: float, digits: int = 2) -> str:
    return f"{other / plain:.{digits}f}" if plain else "-"


def _as_record(outcome: Outcome) -> dict[str, Any]:
    reports = {
        name: {"peak_bytes": report.peak_bytes, "by_category": dict(report.by_category), "notes": report.notes}
        for name, report in (("measured", outcome.measured), ("predicted", outcome.predicted))
    }
    return {
        "name": outcome.name,
        "techniques": outcome.techniques,
        **reports,
        "seconds_per_step": outcome.seconds_per_step,
        "validation_loss": outcome.validation_loss,
        "training_losses": outcome.training_losses,
    }
