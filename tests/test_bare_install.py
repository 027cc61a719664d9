"""Installed with no extra: everything that needs none works, and the rest names the one that it needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NEEDS = {
    "LowBitOptimizer of bitsandbytes": "bitsandbytes.*pip install 'lightning-memopt\\[quantize\\]'",
    "LowBitOptimizer of torchao": "torchao.*pip install 'lightning-memopt\\[quantize\\]'",
    "MemoryReport.plot": "matplotlib.*pip install 'lightning-memopt\\[plot\\]'",
    "prune_structured": 'torch-pruning.*pip install "lightning-memopt\\[prune\\]"',
    "export_onnx": 'onnxruntime.*pip install "lightning-memopt\\[onnx\\]"',
    "export_executorch": 'executorch.*pip install "lightning-memopt\\[executorch\\]"',
}
WORKS = [
    "every public name", "predict_memory", "measure_memory", "plan", "chunked_cross_entropy", "GradientAccumulation",
    "MicroBatching", "ActivationCheckpointing", "ActivationOffload", "OptimizerInBackward",
    "LowBitOptimizer of 8 bits", "LowBitOptimizer of 4 bits", "LowBitOptimizer of fp8", "MemoryMonitor",
    "MixedPrecision", "HalfPrecision", "PruneOnFitEnd", "QuantizeOnFitEnd",
]  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.bare_install"],
        cwd=tmp_path_factory.mktemp("bare"),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("use", WORKS)
def test_without_any_optional_library_it_works(bare, use):
    assert bare["outcomes"][use] is None


@pytest.mark.parametrize("use", NEEDS)
def test_what_needs_an_optional_library_names_it_and_the_extra_that_brings_it(bare, use):
    kind, message = bare["outcomes"][use]
    assert kind == ("MisconfigurationException" if use.startswith("LowBit") else "ModuleNotFoundError")
    assert re.search(NEEDS[use], message)


def test_each_use_is_expected_to_work_or_to_name_what_it_needs_and_nothing_optional_was_there(bare):
    assert bare["outcomes"].keys() == {*WORKS, *NEEDS}
    assert bare["loaded"] == []
