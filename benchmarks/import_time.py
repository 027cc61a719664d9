"""What ``import lightning_memopt`` takes over ``import lightning.pytorch``, in fresh interpreters.

    python benchmarks/import_time.py           # about 2 minutes
    python benchmarks/import_time.py --runs 2  # does it run?

Each interpreter imports both under ``-X importtime``: what the package takes is its cumulative time there, in which
that of Lightning, which is loaded by then, is not.
"""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from environment import environment_record, now
from options import Options, open_results

RESULTS = Path(__file__).parent / "results" / "import_time.json"
ALLOWED_SECONDS = 0.3
MODULES = ("lightning.pytorch", "lightning_memopt")


def main() -> int:
    options = Options(__doc__, RESULTS)
    options.add_count("runs", 10, "interpreters that the medians are taken from")
    options = options.parse()
    results = open_results(options.out, {"environment": environment_record(), "allowed_seconds": ALLOWED_SECONDS})
    imported_seconds()  # reads the files once, so that the runs find them in memory
    runs = [imported_seconds() for _ in range(options.runs)]
    for module in MODULES:
        seconds = [run[module] for run in runs]
        row = {"seconds": median(seconds), "highest_seconds": max(seconds), "runs": len(runs), "measured_at": now()}
        results.add(module, row, list(MODULES))
        print(f"{module}: {row['seconds']:.3f} s, at most {row['highest_seconds']:.3f} s")
    return 0 if results.rows["lightning_memopt"]["seconds"] <= ALLOWED_SECONDS else 1


def imported_seconds() -> dict[str, float]:
    """Cumulative seconds of each of the modules' imports, in this order, in one interpreter."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "; ".join(f"import {module}" for module in MODULES)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    rows = [line.removeprefix("import time:").split("|") for line in ran.stderr.splitlines() if line.count("|") == 2]
    cumulative = {name.strip(): microseconds for _, microseconds, name in rows}
    return {module: int(cumulative[module]) / 1e6 for module in MODULES}


if __name__ == "__main__":
    sys.exit(main())
