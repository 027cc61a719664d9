"""How long a module takes in each scheme beside fp32, for one token and for a batch, as it is and compiled.

    python benchmarks/scheme_speed.py

Two blocks of the demo's language model, whose weights do not fit a processor's second-level cache. Every scheme runs
everywhere; where there are no instructions for it, weights are unpacked to be multiplied, and that takes time.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, get_args

import torch
from environment import environment_record, now
from options import Options, open_results

from lightning_memopt.compression.quantize import Scheme, quantize
from lightning_memopt.compression.ranges import observe_inputs
from lightning_memopt.demo.model import GPT

RESULTS = Path(__file__).parent / "results" / "scheme_speed.json"
SIZES = {"one token": (1, 1), "8 x 128 tokens": (8, 128)}
SCHEMES = [scheme for scheme in get_args(Scheme) if scheme != "int8"]  # the short name of int8_weight_only


def main() -> int:
    options = Options(__doc__, RESULTS, SCHEMES)
    options.add_count("runs", 40, "pairs of runs that a ratio is the median of")
    options = options.parse()
    width = 32 if options.quick else 512
    method = f"Median ratio of {options.runs} pairs of neighbouring runs, in processor time."
    results = open_results(options.out, {"environment": environment_record(), "time_method": method})
    torch.manual_seed(0)
    plain = GPT(2, width, 4, 128).eval()
    for scheme in options.only or SCHEMES:
        packed, row = deepcopy(plain), dict[str, Any]()
        with observe_inputs(packed) as ranges:
            packed(torch.randint(0, 256, (8, 128)))
        done = quantize(packed, scheme, input_ranges=ranges)
        row["ratio"] = done.bytes_after / done.bytes_before
        for title, size in SIZES.items():
            tokens = torch.randint(0, 256, size)
            row[title] = [_speedup(plain, packed, tokens, options.runs)]
            torch.compiler.reset()
            row[title].append(_speedup(torch.compile(plain), torch.compile(packed), tokens, options.runs))
        results.add(scheme, row | {"measured_at": now()}, SCHEMES)
        print(scheme, row, flush=True)
    return 0


@torch.no_grad()
def _speedup(plain: Callable[[Any], Any], packed: Callable[[Any], Any], tokens: Any, runs: int) -> float:
    pairs = [(_seconds(plain, tokens), _seconds(packed, tokens)) for _ in range(runs + 3)][3:]
    return median(first / second for first, second in pairs)


def _seconds(module: Callable[[Any], Any], tokens: Any) -> float:
    start = process_time()
    module(tokens)
    return process_time() - start


if __name__ == "__main__":
    raise SystemExit(main())
