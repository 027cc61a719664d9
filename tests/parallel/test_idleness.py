"""A process is idle when neither it nor its children do anything."""

import subprocess
import sys
import time

import pytest

from lightning_memopt.parallel.idleness import Idleness

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is missing, from which idleness is read")


def test_a_process_that_sleeps_is_idle_for_as_long() -> None:
    idleness = Idleness(window=5)
    time.sleep(0.5)
    assert idleness.seconds() >= 0.5


def test_a_process_whose_child_computes_is_not_idle() -> None:
    idleness = Idleness(window=5)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        time.sleep(1.0)
        try:
            assert idleness.seconds() < 0.5
        finally:
            child.kill()


def test_a_process_that_reads_is_not_idle() -> None:
    idleness = Idleness(window=5)
    time.sleep(0.3)
    read = subprocess.run(
        [sys.executable, "-c", "open('/dev/zero', 'rb').read(1 << 22)"], check=True, capture_output=True
    )
    assert read.returncode == 0
    assert idleness.seconds() < 0.3
