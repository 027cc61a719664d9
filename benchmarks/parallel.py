"""The strategies against loops by hand with the same torch primitives, and against Lightning's own strategies.

    python benchmarks/parallel.py                          # all rows, about 10 minutes on 2 cores
    python benchmarks/parallel.py --only memopt_pp_by_hand # one row, merged into the results
    python benchmarks/parallel.py --quick --out q.json     # toy size: does it run?

Two ranks: each on a GPU of its own over NCCL where there are two, else on the CPU over gloo, one thread each. How
times are taken is said in ``paired.py``: here two groups of ranks take turns, and a group's step takes as long as its
slowest rank's.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import workload
from environment import environment_record, now
from options import Options, open_results
from paired import compare_steps
from parallel_bodies import loop_by_hand, train
from parallel_workload import FULL, QUICK, Size
from rank_device import BACKENDS, kind_for
from ranks import RankGroup
from workers import WorkerError

from lightning_memopt.parallel.pipeline.timing import pipeline_time

RESULTS = Path(__file__).parent / "results" / "parallel.json"
RANKS = 2
WARM_UP = 3
LIGHTNINGS = {"memopt_ddp": "ddp", "memopt_zero3": "ModelParallelStrategy"}
"""Which of Lightning's own strategies does the same."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        title: As the table says it.
        measure: Takes the size and how many pairs; returns at least ``ratio``.
        target: The highest ratio allowed.
    """

    title: str
    measure: Callable[[Size, int], dict[str, Any]]
    target: float


def main() -> int:
    options = _options().parse()
    workload.preload()
    size = QUICK if options.quick else FULL
    header = {
        "environment": environment_record() | {"ranks": RANKS},
        "workload": asdict(size),
    }
    results = open_results(options.out, header)
    failed = False
    for name in options.only or ROWS:
        row = ROWS[name]
        try:
            found = row.measure(size, options.pairs)
            found["met"] = found["ratio"] <= row.target
        except WorkerError as error:
            found, failed = {"error": str(error)}, True
        about = {"backend": BACKENDS[kind_for(RANKS)], "measured_at": now()}
        results.add(name, {"title": row.title, "target": row.target, **found, **about}, list(ROWS))
        print(f"{name}: {found.get('error') or round(found['ratio'], 3)} (target {row.target})", flush=True)
    return 1 if failed else 0


def _against_by_hand(strategy: str, times: int = 1) -> Callable[[Size, int], dict[str, Any]]:
    """With batches so many times as large: what a micro-batch costs besides its layers is the same for any."""

    def measure(size: Size, pairs: int) -> dict[str, Any]:
        size = replace(size, batch_size=times * size.batch_size)
        with (
            RankGroup(loop_by_hand, strategy, size, ranks=RANKS) as by_hand,
            RankGroup(train, strategy, size, "turns", ranks=RANKS) as ours,
        ):
            return _paired(by_hand, ours, pairs)

    return measure


def _against_lightning(strategy: str) -> Callable[[Size, int], dict[str, Any]]:
    def measure(size: Size, pairs: int) -> dict[str, Any]:
        with (
            RankGroup(train, LIGHTNINGS[strategy], size, "turns", ranks=RANKS) as theirs,
            RankGroup(train, strategy, size, "turns", ranks=RANKS) as ours,
        ):
            return _paired(theirs, ours, pairs)

    return measure


def _paired(other: RankGroup, ours: RankGroup, pairs: int) -> dict[str, Any]:
    for group in (other, ours):
        for _ in range(WARM_UP):
            group.step()
    found = asdict(compare_steps(other, ours, pairs))
    return found | {"seconds": found["seconds"], "other_seconds": found.pop("plain_seconds")}


def _memory(strategy: str) -> Callable[[Size, int], dict[str, Any]]:
    def measure(size: Size, pairs: int) -> dict[str, Any]:
        peaks = [_once(name, size, "memory") for name in (strategy, LIGHTNINGS[strategy])]
        return {"ratio": peaks[0] / peaks[1], "peak_bytes": peaks[0], "other_peak_bytes": peaks[1]}

    return measure


def _start(strategy: str) -> Callable[[Size, int], dict[str, Any]]:
    """From an interpreter that has imported nothing to the end of the first step, as a user waits for it."""

    def measure(size: Size, pairs: int) -> dict[str, Any]:
        runs = [
            [_once(name, size, "start", "spawn") for name in (strategy, "ddp")] for _ in range(max(3, pairs // 4))
        ]
        ratio = median(own / other for own, other in runs)
        return {"ratio": ratio, "seconds": median(own for own, _ in runs), "pairs": len(runs)}

    return measure


def _watch(size: Size, pairs: int) -> dict[str, Any]:
    """Processor time with the thread that watches over other ranks, where its rank enters most phases in a step."""
    with (
        RankGroup(train, "memopt_pp", size, "unwatched", ranks=RANKS) as without,
        RankGroup(train, "memopt_pp", size, "processor", ranks=RANKS) as watched,
    ):
        return _paired(without, watched, pairs)


def _idle_share(size: Size, pairs: int) -> dict[str, Any]:
    """The share of a pipeline's forward and backward in which a rank waits, against the schedule's theory.

    A rank that has ended its part waits for the last one, whether it says so or not. The vocabulary is small and
    there are twice as many layers, so that the head on the last stage hardly weighs, and micro-batches have four
    sequences, so that the messages between them do not either. What is left of imbalance is told by playing the
    schedule with what each rank computed for, and what is the machine's by the same of a loop by hand.
    """
    size = replace(size, layers=2 * size.layers, vocabulary=min(size.vocabulary, 64), batch_size=4 * size.batch_size)
    with (
        RankGroup(train, "memopt_pp", size, "waiting", ranks=RANKS) as ours,
        RankGroup(loop_by_hand, "memopt_pp", size, "waiting", ranks=RANKS) as by_hand,
    ):
        groups = {"ours": ours, "by_hand": by_hand}
        shares: dict[str, list[float]] = {name: [] for name in groups}
        computed: dict[str, list[list[float]]] = {name: [] for name in groups}
        for step in range(WARM_UP + pairs):
            for name, group in groups.items():
                clocks = group.ask("go")
                if step >= WARM_UP:
                    longest = max(wall for wall, _ in clocks)
                    computed[name].append([seconds for _, seconds in clocks])
                    shares[name].append(1 - sum(computed[name][-1]) / (RANKS * longest))
    share, share_by_hand = median(shares["ours"]), median(shares["by_hand"])
    # Narayanan et al. 2021 (https://arxiv.org/abs/2104.04473), section 2.2: of m + p - 1 slots, p - 1 are idle.
    theory = (RANKS - 1) / (size.micro_batches + RANKS - 1)
    return {
        "ratio": share / theory,
        "idle_share": share,
        "played_ratio": _played(computed["ours"], size) / theory,
        "by_hand_ratio": share_by_hand / theory,
        "by_hand_played_ratio": _played(computed["by_hand"], size) / theory,
        "theory": theory,
        "pairs": pairs,
    }


def _played(computed: list[list[float]], size: Size) -> float:
    """The idle share of a machine that always takes as long, and whose messages take no time."""
    thirds = [median(seconds) / size.micro_batches / 3 for seconds in zip(*computed, strict=True)]
    return pipeline_time("1f1b", RANKS, size.micro_batches, thirds, [2 * third for third in thirds]).idle_share


def _once(strategy: str, size: Size, kind: str, method: str | None = None) -> float:
    with RankGroup(train, strategy, size, kind, ranks=RANKS, method=method) as group:
        return max(group.receive())


STRATEGIES = ("memopt_ddp", "memopt_zero3", "memopt_tp", "memopt_pp")
ROWS: dict[str, Row] = {
    **{f"{s}_by_hand": Row(f"{s}: step, against a loop by hand", _against_by_hand(s), 1.05) for s in STRATEGIES},
    "memopt_pp_by_hand_of_fours": Row(
        "memopt_pp: step of micro-batches of four sequences, against a loop by hand",
        _against_by_hand("memopt_pp", times=4),
        1.05,
    ),
    **{f"{s}_lightning": Row(f"{s}: step, against {t}", _against_lightning(s), 1.0) for s, t in LIGHTNINGS.items()},
    **{f"{s}_memory": Row(f"{s}: peak memory, against {t}", _memory(s), 1.0) for s, t in LIGHTNINGS.items()},
    "memopt_pp_watch": Row("memopt_pp: processor time of a step, against none watching other ranks", _watch, 1.02),
    "memopt_pp_idle": Row("memopt_pp: idle share, against (p-1)/(m+p-1)", _idle_share, 1.1),
    **{f"{s}_start": Row(f"{s}: first step done, against ddp", _start(s), 1.5) for s in STRATEGIES},
}


def _options() -> Options:
    options = Options(__doc__, RESULTS, ROWS)
    options.add_count("pairs", 16, "pairs of steps that a row's time is taken from")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
