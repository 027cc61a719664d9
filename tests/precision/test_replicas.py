import math

import pytest

from tests.distributed import run_on_ranks
from tests.precision.replicas import train


@pytest.mark.distributed
def test_replicas_stay_equal_though_their_seeds_differ_and_one_of_them_overflows():
    first, second = run_on_ranks(train, 2, deadline_seconds=180)
    assert first == second
    assert all(math.isfinite(value) for value in first["half"] + first["mixed"])
    assert first["state"]["skipped_steps"] == 1
    assert first["state"]["scale"] == 32.0
