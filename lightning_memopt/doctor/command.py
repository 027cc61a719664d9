"""``lightning-memopt doctor``: its options, and what it prints."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_memopt.planning.devices import DeviceModel


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the command line; torch is imported when it runs, so that ``--help`` is quick."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine is and can do, and measure it for the planner",
        description="Say what this machine is and can do, and measure what the planner counts with. Measurements are "
        "kept in the user's cache folder for each device, number of threads and version of torch.",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--refresh", action="store_true", help="measure again what is kept already")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0 in any case, since what cannot be measured or kept is itself a finding."""
    from lightning_memopt.doctor.machine import describe_machine
    from lightning_memopt.planning.device_cache import cache_file, cached_device

    machine = describe_machine()
    model = None if options.refresh else cached_device()
    notes: list[str] = []
    if model is None:
        model = _measure(notes)
    if options.json:
        known = {"measured": json.loads(model.to_json()), "cache": str(cache_file()), "notes": notes}
        print(json.dumps(machine | known, indent=1))
        return 0
    _show(machine, model, notes, str(cache_file()))
    return 0


def _measure(notes: list[str]) -> "DeviceModel":
    """Measure and keep; what goes wrong is added to ``notes``."""
    from lightning_memopt.doctor.links import measure_links
    from lightning_memopt.planning.calibrate import measure_device
    from lightning_memopt.planning.device_cache import keep_device

    print("Measuring this machine; it takes some seconds, and is best left alone for them.", file=sys.stderr)
    links = None
    try:
        links = measure_links()
    except (OSError, ValueError) as error:
        notes.append(f"collectives were not measured, and are taken for usual ones: {error}")
    model = measure_device(links)
    try:
        keep_device(model)
    except OSError as error:
        notes.append(f"the measurements could not be kept ({error}); the next run measures again")
    return model


def _show(machine: dict[str, Any], model: "DeviceModel", notes: list[str], cache: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = machine["versions"]
    console.print("Installed: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    if missing := [name for name, version in versions.items() if version is None]:
        console.print(f"Not installed: {', '.join(missing)}")
    for device in machine["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("name", "memory_bytes"))
        console.print(f"Device: {device['name']}: {(device['memory_bytes'] or 0) / 2**30:.1f} GiB, {rest}")
    for ability, is_there in machine["abilities"].items():
        console.print(f"  {'yes' if is_there else 'no ':3} {ability}")
    table = Table("what the planner counts with", "", title=f"{model.name} ({model.source}, {model.date})")
    for row in _rows(model):
        table.add_row(*row)
    console.print(table)
    console.print(f"Kept in {cache}", soft_wrap=True)
    for note in notes:
        console.print(f"Note: {note}", soft_wrap=True, highlight=False, markup=False)


def _rows(model: "DeviceModel") -> list[tuple[str, str]]:
    again = model.recompute_overheads
    rows = [(f"products in {dtype}", f"{rate / 1e9:.1f} GFLOP/s") for dtype, rate in model.matmul_flops.items()]
    rows += [
        ("memory", f"{model.memory_bandwidth / 1e9:.1f} GB/s"),
        ("copies from and to the host", f"{model.host_link / 1e9:.1f} GB/s"),
        ("call of an operator", f"{model.operator_overhead * 1e6:.1f} us"),
        *((f"call under {policy} checkpointing", f"{seconds * 1e6:.1f} us") for policy, seconds in again.items()),
        ("micro-batch", f"{model.micro_batch_overhead * 1e6:.1f} us"),
        ("single operators measured", str(len(model.operator_rates))),
        ("allocator hands out multiples of", f"{model.granularity} B"),
        ("libraries hold", f"{model.workspace_bytes / 2**20:.1f} MiB"),
    ]
    link = model.links["intra"]
    if not link.measured:
        return [
            *rows,
            ("link between devices (usual)", f"{link.bandwidth / 1e9:.1f} GB/s, {link.latency * 1e6:.0f} us"),
        ]
    for kind, points in link.measured.items():
        each = ", ".join(f"{size // 1024} KiB {seconds * 1e3:.2f} ms" for size, seconds in points)
        rows.append((f"{kind} of two", each))
    return rows
