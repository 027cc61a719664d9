"""What tensor parallelism leaves of each module's parameters on a rank: exact bytes of the plan, in seconds.

python -m benchmarks.tensor_shares
"""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_memopt.parallel.tensor.plan import find_tensor_plan
from tests.zoo import ZOO
from tests.zoo.architectures import ARCHITECTURES

RESULTS = Path(__file__).parent / "results" / "tensor_shares.json"
RANKS = 2


def row(module: pl.LightningModule) -> dict[str, Any]:
    """Bytes of the parameters of ``module`` on one device and on each of the ranks."""
    module.configure_model()
    entries = find_tensor_plan(module, RANKS, {}).entries.values()
    return {"whole_bytes": sum(e.whole_bytes for e in entries), "rank_bytes": sum(e.rank_bytes for e in entries)}


def main() -> None:
    """Write the results of the whole zoo, and of the families beside it."""
    rows = {name: row(entry.build()) for name, entry in (ZOO | ARCHITECTURES).items()}
    RESULTS.write_text(json.dumps({"ranks": RANKS, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
