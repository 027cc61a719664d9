"""Figure 3 of the planner: what other estimators say of the peak of a step, against what was measured.

    pip install accelerate deepspeed    # either may be missing; its column is then empty
    PYTHONPATH=. python benchmarks/planner_others.py
    PYTHONPATH=. python benchmarks/planner_others.py --models mlp --out F    # does it run?

``accelerate estimate-memory`` counts four times the parameters for training with Adam, DeepSpeed's estimators count
the states of the model under ZeRO: neither looks at a batch. All are asked about one process without offload.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from environment import environment_record, now
from results_file import ResultsFile

import lightning_memopt as memopt
from tests.zoo import ZOO

RESULTS = Path(__file__).parent / "results" / "planner_others.json"
MODELS = ("mlp", "encoder", "gpt2", "llama", "bert_qa", "cnn", "vit")


def by_accelerate(module: Any) -> int | None:
    """What ``accelerate estimate-memory`` prints as "Training using Adam", in float32."""
    try:
        sizes = importlib.import_module("accelerate.utils").calculate_maximum_sizes
    except ImportError:
        return None
    return 4 * sizes(module)[0]


def by_deepspeed(module: Any) -> int | None:
    """What DeepSpeed's estimator of ZeRO 2 says of the device."""
    try:
        estimator = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    except ImportError:
        return None
    parameters = sum(parameter.numel() for parameter in module.parameters())
    _, device_bytes = estimator.estimate_zero2_model_states_mem_needs(parameters, 1, 1, cpu_offload=False)
    return int(device_bytes)


def compare(name: str, batch_size: int) -> dict[str, Any]:
    """Bytes by estimator, and the error of each."""
    entry = ZOO[name]
    batch = entry.batch(batch_size)
    measured = memopt.measure_memory(entry.build(), batch).peak_bytes
    said = {
        "lightning_memopt": memopt.predict_memory(entry.build(), batch).peak_bytes,
        "accelerate": by_accelerate(entry.build()),
        "deepspeed": by_deepspeed(entry.build()),
    }
    errors = {one: count / measured - 1 for one, count in said.items() if count is not None}
    return {"measured_bytes": measured, "estimated_bytes": said, "error": errors, "measured_at": now()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    header = {"environment": environment_record(), "workload": {"batch_size": options.batch_size}}
    results = ResultsFile(options.out, header)
    for name in options.models:
        results.add(name, compare(name, options.batch_size), list(MODELS))
        print(name, {one: f"{error:+.1%}" for one, error in results.rows[name]["error"].items()}, flush=True)


if __name__ == "__main__":
    main()
