"""Every module of the zoo under every strategy against one device: the table that the docs keep.

python -m tests.strategies.parity_matrix                      # all, about half an hour on 2 cores
python -m tests.strategies.parity_matrix --only memopt_pp     # one strategy, merged into what is known
"""

import argparse
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.distributed import RankFailed
from tests.strategies.parity import CASES, assert_same_outcome, on_one_device, on_ranks
from tests.zoo import ZOO

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "parity.json"

_REFUSAL = re.compile(r"^(?:\w+\.)*MisconfigurationException: (.*)", re.MULTILINE | re.DOTALL)


def try_pair(name: str, strategy: str) -> dict[str, str]:
    """What came of one module under one strategy: ``same``, ``refused`` with the error, or ``differs``."""
    try:
        outcomes = on_ranks(name, strategy)
    except RankFailed as error:
        refusal = _REFUSAL.search(str(error))
        if refusal is None:
            return {"result": "fails", "why": str(error).strip().splitlines()[-1]}
        return {"result": "refused", "why": " ".join(refusal[1].split())}
    try:
        for outcome in outcomes:
            assert_same_outcome(on_one_device(name), outcome)
    except AssertionError as error:
        if ZOO[name].has_batch_norm:
            return {"result": "warned", "why": "BatchNorm normalizes over each rank's or micro-batch's share"}
        return {"result": "differs", "why": " ".join(str(error).split())[:300]}
    return {"result": "same"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, help="a strategy; may be given again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"modules": {}}
    good = True
    for name in ZOO:
        row = known["modules"].setdefault(name, {})
        for strategy in options.only or CASES:
            row[strategy] = try_pair(name, strategy) | {"measured_at": _now()}
            good &= row[strategy]["result"] in ("same", "refused", "warned")
            print(f"{name:14} {strategy:20} {row[strategy]['result']} {row[strategy].get('why', '')}", flush=True)
        known["modules"][name] = {strategy: row[strategy] for strategy in CASES if strategy in row}
    known["torch"] = torch.__version__
    options.out.write_text(json.dumps(known, indent=1) + "\n")
    return 0 if good else 1


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


if __name__ == "__main__":
    sys.exit(main())
