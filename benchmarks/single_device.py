"""Each technique alone and all together on one device: memory to the byte, time as a ratio to plain Lightning.

    python benchmarks/single_device.py                      # all rows, about 12 minutes on 2 cores
    python benchmarks/single_device.py --only chunked_loss  # one row, merged into the results
    python benchmarks/single_device.py --quick              # all rows at toy size: does it run?

How times are taken is said in ``paired.py``, what is compared in ``rows.py``.
"""

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import workload
from environment import environment_record, now
from options import Options, open_results
from paired import Stepper, compare_steps
from results_file import ResultsFile
from rows import ROWS, plain_of
from verdict import memory_ratio, summarize, time_bound
from workers import Channel, WorkerError, in_worker

import lightning_memopt as memopt

RESULTS = Path(__file__).parent / "results" / "single_device.json"


def main() -> int:
    options = _options().parse()
    workload.preload()
    sizes = workload.QUICK if options.quick else workload.FULL
    header = {
        "environment": environment_record(),
        "time_method": f"Time is the median ratio of {options.pairs} pairs of neighbouring steps.",
        "workload": {str(vocabulary): asdict(size) for vocabulary, size in sizes.items()},
    }
    results = open_results(options.out, header)
    failed = False
    names = sorted(options.only or ROWS, key=lambda name: (ROWS[name].vocabulary, list(ROWS).index(name)))
    for vocabulary, group in groupby(names, key=lambda name: ROWS[name].vocabulary):
        failed |= not _measure_group(list(group), sizes[vocabulary], options.pairs, results)
    return 1 if failed else 0


def _measure_group(names: list[str], size: workload.Size, pairs: int, results: ResultsFile) -> bool:
    """Measure rows that share one plain run, and say whether all went well.

    The plain row is timed against a second plain run: how far that is from 1 is how far noise reaches.
    """
    plain = plain_of(ROWS[names[0]])
    if plain not in results.rows and plain not in names:
        names = [plain, *names]
    good = True
    with Stepper(plain, size) as plain_stepper:
        for name in names:
            try:
                record: dict[str, Any] = {"memory": in_worker(_memory, name, size)}
                with Stepper(name, size) as stepper:
                    record["time"] = asdict(compare_steps(plain_stepper, stepper, pairs))
                if name != plain:
                    record |= _verdict(name, plain, record, results)
            except WorkerError as error:
                record = {"error": str(error)}
                good = False
            _keep(name, record | {"measured_at": now()}, results)
    return good


def _memory(channel: Channel, name: str, size: workload.Size) -> None:
    """Body of a worker that predicts and measures one step."""
    workload.be_quiet()
    predicted = memopt.predict_memory(size.build(), size.batch(), **ROWS[name].options())
    measured = memopt.measure_memory(size.build(), size.batch(), **ROWS[name].options())
    channel.send({"predicted_peak_bytes": predicted.peak_bytes, **summarize(measured)})


def _verdict(name: str, plain: str, record: dict[str, Any], results: ResultsFile) -> dict[str, Any]:
    row = ROWS[name]
    memory = memory_ratio(row, record["memory"], results.rows[plain]["memory"])
    bound = time_bound(row, results.rows)
    met = [
        ratio <= allowed
        for ratio, allowed in ((memory, row.memory_target), (record["time"]["ratio"], bound))
        if allowed is not None
    ]
    return {
        "quantity": row.quantity,
        "memory_ratio": memory,
        "memory_target": row.memory_target,
        "time_target": bound,
        "met": all(met) if met else None,
    }


def _keep(name: str, record: dict[str, Any], results: ResultsFile) -> None:
    row = ROWS[name]
    results.add(name, {"title": row.title, "limit": row.limit, **record}, list(ROWS))
    if "error" in record:
        print(f"{name}: {record['error']}", flush=True)
        return
    peak = record["memory"]["peak_bytes"] / 2**20
    predicted = record["memory"]["predicted_peak_bytes"] / record["memory"]["peak_bytes"]
    line = f"{name}: peak {peak:.1f} MiB (predicted / measured {predicted:.3f})"
    if "time" in record:
        line += f", time {record['time']['ratio']:.3f}"
    if "memory_ratio" in record:
        line += f", {row.quantity} {record['memory_ratio']:.3f}"
    print(line, flush=True)


def _options() -> Options:
    options = Options(__doc__, RESULTS, ROWS)
    options.add_count("pairs", 8, "pairs of steps that a row's time is taken from")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
