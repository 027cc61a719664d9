"""Write the tables of the README and the docs from the results of the benchmarks.

A table stands between two markers, ``<!-- table:NAME -->`` and ``<!-- /table -->``, and comes from
``results/NAME.json``.

    python benchmarks/tables.py          # rewrite what stands between the markers
    python benchmarks/tables.py --check  # exit 1 if a file is not what the results say
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

_TABLE = re.compile(r"(<!-- table:(?P<name>\w+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
_QUANTITIES = {"optimizer_state": "optimizer state", "activations+temporaries": "activations + temporaries"}
_MIB = 2**20


def techniques_table(results: dict[str, Any]) -> str:
    """The table of techniques against plain Lightning, with a line on where and how it was measured.

    Args:
        results: What ``single_device.py`` or ``gpu.py`` wrote.
    """
    lines = [
        "| technique | peak | memory against plain (target) | time against plain (target) | met "
        "| predicted / measured peak | what limits it |",
        "|---|---:|---|---|:-:|---:|---|",
    ]
    lines += [_row(row) for row in results["rows"].values()]
    return "\n".join([*lines, "", _provenance(results)]) + "\n"


def demo_table(results: dict[str, Any]) -> str:
    """The two runs of ``lightning-memopt demo``, from the JSON that it wrote.

    Args:
        results: What the demo wrote as ``results.json``, kept as ``results/demo.json``.
    """
    plain, other = results["runs"]
    rows: list[tuple[str, str, float, float]] = []
    for category in plain["measured"]["by_category"]:
        pair = [run["measured"]["by_category"].get(category, 0) for run in (plain, other)]
        if any(pair):
            rows.append((category.replace("_", " "), "{:.1f} MiB", pair[0] / _MIB, pair[1] / _MIB))
    peaks = [run["measured"]["peak_bytes"] / _MIB for run in (plain, other)]
    predictions = [run["predicted"]["peak_bytes"] / _MIB for run in (plain, other)]
    rows.append(("**peak**", "{:.1f} MiB", *peaks))
    rows.append(("predicted peak", "{:.1f} MiB", *predictions))
    rows.append(("time per step", "{:.3f} s", plain["seconds_per_step"], other["seconds_per_step"]))
    rows.append(("validation loss (nats/byte)", "{:.4f}", plain["validation_loss"], other["validation_loss"]))
    lines = [f"| | plain Lightning | with {', '.join(other['techniques'])} | ratio |", "|---|---:|---:|---:|"]
    for title, form, first, second in rows:
        ratio = f"{second / first:.2f}" if first else "-"
        lines.append(f"| {title} | {form.format(first)} | {form.format(second)} | {ratio} |")
    shape, versions = results["preset"], results["versions"]
    provenance = (
        f"`lightning-memopt demo --preset {shape['name']} --steps {results['steps']} --seed {results['seed']}`, "
        f"{results['threads']} threads, Python {versions['python']}, torch {versions['torch']}; "
        f"{results['seconds']:.0f} s in all."
    )
    return "\n".join([*lines, "", provenance]) + "\n"


def parallel_table(results: dict[str, Any]) -> str:
    """The strategies against loops by hand and against Lightning's own.

    Args:
        results: What ``parallel.py`` wrote.
    """
    lines = ["| comparison | ratio (target) | met |", "|---|---|:-:|"]
    for row in results["rows"].values():
        if "error" in row:
            lines.append(f"| {row['title']} | {row['error'].replace('|', '/')} | **no** |")
            continue
        met = "yes" if row["met"] else "**no**"
        lines.append(f"| {row['title']} | {row['ratio']:.3f} (≤ {row['target']:.2f}) | {met} |")
    environment = results["environment"]
    packages, ranks = environment["packages"], environment["ranks"]
    backends = sorted({row.get("backend", "gloo") for row in results["rows"].values()})
    dates = _dates(results["rows"].values())
    provenance = (
        f"{ranks} ranks of one thread on {environment['cpu']}, {environment['cores']} cores, {', '.join(backends)}, "
        f"torch {packages['torch']}, lightning {packages['lightning']}, rows measured {dates}. Time is the "
        "median ratio of neighbouring steps."
    )
    idle = results["rows"].get("memopt_pp_idle", {})
    if "played_ratio" in idle:
        provenance += (
            f" Idle shares over theory: {idle['ratio']:.3f} for memopt_pp and {idle['by_hand_ratio']:.3f} for the "
            f"loop by hand; played with what each rank computed for, and messages that take no time: "
            f"{idle['played_ratio']:.3f} and {idle['by_hand_played_ratio']:.3f}."
        )
    return "\n".join([*lines, "", provenance]) + "\n"


def parity_table(results: dict[str, Any]) -> str:
    """Module by strategy: the same training, or why not.

    Args:
        results: What ``tests/strategies/parity_matrix.py`` wrote.
    """
    modules: dict[str, dict[str, dict[str, str]]] = results["modules"]
    strategies = list(next(iter(modules.values())))
    notes: list[str] = []
    lines = [f"| module | {' | '.join(f'`{name}`' for name in strategies)} |", "|---|" + ":-:|" * len(strategies)]
    for module, row in modules.items():
        cells = []
        for strategy in strategies:
            found = row.get(strategy, {"result": ""})
            if why := found.get("why"):
                if why not in notes:
                    notes.append(why)
                cells.append(f"{found['result']} [{notes.index(why) + 1}]")
            else:
                cells.append(found["result"])
        lines.append(f"| {module} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    dates = _dates(pair for row in modules.values() for pair in row.values())
    return "\n".join([*lines, "", f"torch {results['torch']}, gloo, {dates}."]) + "\n"


def compression_table(results: dict[str, Any]) -> str:
    """Recipes of compression by task, other libraries' below ours.

    Args:
        results: What ``compression.py`` wrote.
    """
    lines = [
        "| task | recipe | on disk (target) | in memory | metric before, after | drop (target) "
        "| speed at 1, at 32 (target) | met | notes |",
        "|---|---|---|---:|---|---|---|:-:|---|",
    ]
    for row in sorted(results["rows"].values(), key=lambda row: (row["task"], not row["is_ours"])):
        start = f"| {row['task']} | {row['title'] if row['is_ours'] else '*' + row['title'] + '*'} |"
        if "error" in row:
            lines.append(
                f"{start} {row['error'].split('. ')[0].replace('|', '/')} | | | | | "
                f"{'**no**' if row['is_ours'] else ''} | |"
            )
            continue
        targets = row["targets"]
        size, drop, speed = (targets[key] for key in ("disk_ratio", "drop", "speedup_at_32"))
        unit = "points" if row["metric"].endswith("accuracy") else "% perplexity"
        notes = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in row["notes"].items())
        cells = [
            f"{row['disk_ratio']:.3f}" + ("" if size is None else f" (≤ {size:.2f})"),
            f"{row['memory_ratio']:.3f}",
            f"{row['metric_before']:.4f}, {row['metric_after']:.4f}",
            f"{row['drop']:.2f} {unit}" + ("" if drop is None else f" (≤ {drop:.1f})"),
            f"{row['speedup_at_1']:.2f}, {row['speedup_at_32']:.2f}" + ("" if speed is None else f" (≥ {speed:.1f})"),
            {True: "yes", False: "**no**", None: ""}[row["met"]],
            notes,
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join([*lines, "", _provenance(results)]) + "\n"


def planner_table(results: dict[str, Any]) -> str:
    """How far predictions are off, by module, and what the chosen plans are worth beside the best.

    Args:
        results: What ``planner.py`` wrote.
    """
    lines = []
    if memory := _of_figure(results, "memory"):
        lines += ["| module | plans | mean error of the peak | worst | most under |", "|---|---:|---:|---:|---:|"]
    for name, row in memory:
        errors = (row[key] for key in ("mean_error", "worst_error", "most_under"))
        lines.append(f"| {name} | {len(row['plans'])} | {' | '.join(f'{error:.2%}' for error in errors)} |")
    if choices := _of_figure(results, "choice"):
        lines += [
            "",
            "| module | plans | share of the plain peak | fits | time against the best that fits | order of times |",
            "|---|---:|---:|:-:|---:|---:|",
        ]
    for name, row in choices:
        for budget, found in row["budgets"].items():
            time = "nothing fits" if found["time_to_best"] is None else f"{found['time_to_best']:.2f}"
            fits = "yes" if found["fits"] else "**no**"
            lines.append(
                f"| {name} | {len(row['plans'])} | {float(budget):.0%} | {fits} | {time} "
                f"| {row['rank_correlation']:.2f} |"
            )
    return "\n".join([*lines, "", _environment(results)]) + "\n"


def estimators_table(results: dict[str, Any]) -> str:
    """What estimators of a step's memory are off by.

    Args:
        results: What ``planner_others.py`` wrote.
    """
    names = list(dict.fromkeys(name for row in results["rows"].values() for name in row["error"]))
    lines = [f"| module | measured | {' | '.join(names)} |", "|---|---:|" + "---:|" * len(names)]
    for module, row in results["rows"].items():
        errors = (f"{row['error'][name]:+.1%}" if name in row["error"] else "" for name in names)
        lines.append(f"| {module} | {row['measured_bytes'] / _MIB:.1f} MiB | {' | '.join(errors)} |")
    return "\n".join([*lines, "", _environment(results)]) + "\n"


def batch_size_table(results: dict[str, Any]) -> str:
    """The largest batch that fits, found by training until memory runs out and by predicting.

    Args:
        results: What ``planner_batch_size.py`` wrote.
    """
    lines = [
        "| module | BatchSizeFinder: batch, of the budget | trainings (out of memory), seconds | predicted: batch, "
        "of the budget | predictions, seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for module, row in results["rows"].items():
        found, predicted = row["batch_size_finder"], row["predict_memory"]
        lines.append(
            f"| {module} | {found['batch_size']}, {found['of_budget']:.0%} | {found['trials']} ({found['ran_out']}), "
            f"{found['seconds']:.1f} s | {predicted['batch_size']}, {predicted['of_budget']:.0%} | "
            f"{predicted['predictions']}, {predicted['seconds']:.1f} s |"
        )
    return "\n".join([*lines, "", _environment(results)]) + "\n"


def published_table(results: dict[str, Any]) -> str:
    """Memory that others published for a configuration, against the prediction of it.

    Args:
        results: What ``planner_published.py`` wrote.
    """
    lines = ["| source | configuration | published | predicted | off by | why |", "|---|---|---:|---:|---:|---|"]
    for name, row in results["rows"].items():
        if "error_text" in row:
            lines.append(f"| | {name} | {row['published_gib']:.1f} GiB | | | {row['error_text'].replace('|', '/')} |")
            continue
        lines.append(
            f"| {row['source']} | {name} | {row['published_gib']:.1f} GiB | {row['predicted_gib']:.1f} GiB | "
            f"{row['error']:+.0%} | {row['differs']} |"
        )
    return "\n".join([*lines, "", _environment(results).replace("Measured", "Predicted")]) + "\n"


def planning_time_table(results: dict[str, Any]) -> str:
    """What a plan for a large model takes.

    Args:
        results: What ``planning_time.py`` wrote.
    """
    lines = [
        "| model | devices | processor time (target) | memory of the planner | choices traced | steps traced |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["rows"].items():
        lines.append(
            f"| Llama {name.upper()} | {row['devices']} | {row['seconds']:.0f} s (≤ {row['most_seconds']:.0f} s) | "
            f"{row['peak_bytes'] / 2**30:.2f} GiB | {row['choices_traced']} | {row['steps_traced']} |"
        )
    return "\n".join([*lines, "", _environment(results)]) + "\n"


def _of_figure(results: dict[str, Any], figure: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name.split("/")[1], row) for name, row in results["rows"].items() if name.split("/")[0] == figure]


def monitor_table(results: dict[str, Any]) -> str:
    """What a step takes that the monitor does not sample, as a ratio to one without it.

    Args:
        results: What ``monitor_overhead.py`` wrote.
    """
    rows = results["rows"]
    kinds = [kind for kind in next(iter(rows.values())) if kind != "size"]
    lines = [f"| step | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for row in rows.values():
        seconds = row[kinds[0]]["plain_seconds"]
        ratios = (f"{row[kind]['ratio']:.3f}" for kind in kinds)
        lines.append(f"| {1000 * seconds:.0f} ms | {' | '.join(ratios)} |")
    environment = results["environment"]
    where = f"{environment['cpu']}, torch {environment['packages']['torch']}, {results['measured_at']}"
    return "\n".join([*lines, "", f"{results['clock'].capitalize()}, {where}."]) + "\n"


def kernels_table(results: dict[str, Any]) -> str:
    """How much faster products of integers are, layer by layer.

    Args:
        results: What ``int8_kernels.py`` wrote.
    """
    lines = ["| task | product (rows x inputs x outputs) | fp32, int8 µs | speedup |", "|---|---|---:|---:|"]
    for name, row in results["rows"].items():
        floats, integers = (f"{seconds * 1e6:.0f}" for seconds in row["seconds"])
        shape = name.partition(".")[2]
        lines.append(f"| {row['task']} | {shape} | {floats}, {integers} | {row['speedup']:.2f} |")
    return "\n".join([*lines, "", _provenance(results)]) + "\n"


def schemes_table(results: dict[str, Any]) -> str:
    """How fast a module is in each scheme, as a multiple of fp32.

    Args:
        results: What ``scheme_speed.py`` wrote.
    """
    sizes = [title for title, value in next(iter(results["rows"].values())).items() if isinstance(value, list)]
    lines = [
        f"| scheme | bytes | {' | '.join(f'{title}: as it is, compiled' for title in sizes)} |",
        "|---|---:|" + "---:|" * len(sizes),
    ]
    for scheme, row in results["rows"].items():
        speeds = " | ".join(f"{plain:.2f}, {compiled:.2f}" for plain, compiled in (row[title] for title in sizes))
        lines.append(f"| `{scheme}` | {row['ratio']:.2f} | {speeds} |")
    return "\n".join([*lines, "", _provenance(results)]) + "\n"


def tensor_shares_table(results: dict[str, Any]) -> str:
    """Bytes of parameters on a rank of tensor parallelism against one device.

    Args:
        results: What ``tensor_shares.py`` wrote.
    """
    lines = [f"| module | bytes on one device | on each of {results['ranks']} ranks | |", "|---|---:|---:|---:|"]
    for name, row in results["rows"].items():
        whole, part = row["whole_bytes"], row["rank_bytes"]
        lines.append(f"| {name} | {whole:,} | {part:,} | {part / whole:.1%} |")
    return "\n".join([*lines, "", f"Exact, torch {results['torch']} (`python -m benchmarks.tensor_shares`)."]) + "\n"


def pt2e_table(results: dict[str, Any]) -> str:
    """PyTorch's quantization by export beside ``"int8_static"``.

    Args:
        results: What ``pt2e.py`` wrote.
    """
    lines = [f"| {' | '.join(results['titles'])} |", f"|{'---|' * len(results['titles'])}"]
    lines += [f"| {' | '.join(cells)} |" for cells in results["rows"]]
    return (
        "\n".join([*lines, "", f"torch {results['torch']}, torchao {results['torchao']}, {results['date']}."]) + "\n"
    )


def splits_table(results: dict[str, Any]) -> str:
    """How even stages are by counted and by measured cost.

    Args:
        results: What ``splits.py`` wrote.
    """
    kinds = {"counted": '`"auto"`', "measured": '`"measured"`', "clocked": "best there is"}
    lines = [
        f"| model | stages | {' | '.join(kinds.values())} | to measure |",
        "|---|---:|" + "---:|" * (len(kinds) + 1),
    ]
    for name, row in results["rows"].items():
        about = f"{name}: {row['about'][0].lower()}{row['about'][1:].rstrip('.')}"
        for stages in (key for key in row if key.startswith("stages_")):
            cells = " | ".join(f"{row[stages][kind]:.2f}" for kind in kinds)
            lines.append(
                f"| {about} | {stages.removeprefix('stages_')} | {cells} | {row['seconds_to_measure']:.1f} s |"
            )
    return "\n".join([*lines, "", _environment(results)]) + "\n"


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "single_device": techniques_table,
    "gpu": techniques_table,
    "demo": demo_table,
    "parallel": parallel_table,
    "parity": parity_table,
    "compression": compression_table,
    "int8_kernels": kernels_table,
    "scheme_speed": schemes_table,
    "planner": planner_table,
    "planner_others": estimators_table,
    "planner_batch_size": batch_size_table,
    "planner_published": published_table,
    "planning_time": planning_time_table,
    "monitor_overhead": monitor_table,
    "tensor_shares": tensor_shares_table,
    "pt2e": pt2e_table,
    "splits": splits_table,
}
"""How each results file is drawn, by its name."""


def rewrite(text: str, results_folder: Path = RESULTS) -> str:
    """``text`` with every table between markers replaced by what the results say.

    Raises:
        ValueError: A marker names results that no benchmark writes, or that were never measured.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        path = results_folder / f"{name}.json"
        if name not in RENDERERS:
            raise ValueError(f"table:{name} is no table that benchmarks write; there are {', '.join(RENDERERS)}")
        if not path.exists():
            raise ValueError(f"table:{name} needs {path.name}, which was never measured; run the benchmark first")
        return match[1] + RENDERERS[name](json.loads(path.read_text())) + match[4]

    return _TABLE.sub(table, text)


def outdated(paths: Iterable[Path]) -> dict[Path, str]:
    """The files whose tables are not what the results say, with the text that they should have."""
    texts = {path: path.read_text() for path in paths}
    return {path: new for path, text in texts.items() if (new := rewrite(text)) != text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    options = parser.parse_args()
    try:
        changes = outdated([ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in changes.items():
        if options.check:
            print(f"{path.relative_to(ROOT)} is out of date: run python benchmarks/tables.py", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"{path.relative_to(ROOT)} rewritten")
    return 1 if options.check and changes else 0


def _row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['title']} | | | | | | {row['error'].replace('|', '/')} |"
    memory, quantity, time = row["memory"], "", ""
    if "time" in row:
        time = f"{row['time']['ratio']:.2f}{_bound(row.get('time_target'))}"
    if "memory_ratio" in row:
        name = _QUANTITIES.get(row["quantity"], row["quantity"])
        quantity = f"{name} {row['memory_ratio']:.3f}{_bound(row['memory_target'])}"
    cells = (
        row["title"],
        f"{memory['peak_bytes'] / _MIB:.0f} MiB",
        quantity,
        time,
        {True: "yes", False: "**no**", None: ""}[row.get("met")],
        f"{memory['predicted_peak_bytes'] / memory['peak_bytes']:.3f}",
        row["limit"],
    )
    return f"| {' | '.join(cells)} |"


def _bound(value: float | None) -> str:
    return "" if value is None else f" (≤ {value:.2f})"


def _environment(results: dict[str, Any]) -> str:
    environment = results["environment"]
    where = environment.get("gpu", {}).get("name") or f"{environment['cpu']}, {environment['threads']} threads"
    packages = environment["packages"]
    dates = _dates(results["rows"].values())
    return f"Measured on {where}, torch {packages['torch']}, lightning {packages['lightning']}, {dates}."


def _dates(rows: Iterable[dict[str, Any]]) -> str:
    """From the oldest row to the newest, which may be of several runs."""
    dates = sorted(row["measured_at"] for row in rows)
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def _provenance(results: dict[str, Any]) -> str:
    return f"{_environment(results)} {results['time_method']}"


if __name__ == "__main__":
    raise SystemExit(main())
