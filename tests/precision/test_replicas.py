import math

from tests.ranks import run_ranks


def test_replicas_stay_equal_though_their_seeds_differ_and_one_of_them_overflows(tmp_path):
    first, second = run_ranks("tests.precision.replicas:train", tmp_path, deadline=180)
    assert first == second
    assert all(math.isfinite(value) for value in first["half"] + first["mixed"])
    assert first["state"]["skipped_steps"] == 1
    assert first["state"]["scale"] == 32.0
