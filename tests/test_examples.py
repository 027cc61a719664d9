"""The examples run as they are and say what they are meant to show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def _output(name: str) -> str:
    ran = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_one_line_lowers_the_peak_and_leaves_the_weights_as_they_were():
    said = _output("any_module.py")
    plain, checkpointed = (float(size) for size in re.findall(r"peak ([\d.]+) MiB", said))
    assert checkpointed < 0.7 * plain
    assert "same weights: True" in said


@pytest.mark.slow
def test_token_weighted_accumulation_is_the_big_batch_and_lightnings_is_not():
    said = _output("token_weighted_accumulation.py")
    lightning, weighted = (float(value) for value in re.findall(r"(\d\.\de[-+]\d+)", said))
    assert weighted < 1e-5 < 1e-3 < lightning


@pytest.mark.slow
def test_prediction_ranks_the_choices_before_any_training():
    peaks = dict(re.findall(r"^([\w -]+): ([\d.]+) MiB", _output("predict_before_training.py"), re.MULTILINE))
    assert len(peaks) == 4
    plain, checkpointing, micro_batches, both = (float(peak) for peak in peaks.values())
    assert both < micro_batches < checkpointing < plain


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert all(path.name in tested for path in EXAMPLES.glob("*.py"))
