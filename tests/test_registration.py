"""Strategy names: known to Lightning whichever of the two is imported first, and without loading a strategy."""

import subprocess
import sys

import pytest

from lightning_memopt.registration import STRATEGIES, register_strategies

PRINT_NAMES = (
    "from lightning.pytorch.strategies import StrategyRegistry\n"
    "print(*sorted(name for name in StrategyRegistry if name.startswith('memopt_')))\n"
    "print('lightning_memopt.strategies.data_parallel' in sys.modules)\n"
)


@pytest.mark.parametrize(
    "imports",
    [
        "lightning.pytorch, lightning_memopt",
        pytest.param("lightning_memopt, lightning.pytorch", marks=pytest.mark.slow),
    ],
)
def test_the_names_are_known_in_either_order_of_import(imports):
    code = f"import sys, {imports}\n{PRINT_NAMES}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.splitlines() == [" ".join(sorted(STRATEGIES)), "False"]


def test_importing_the_package_alone_loads_no_lightning():
    code = "import sys, lightning_memopt\nprint([name for name in ('torch', 'lightning') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"


def test_registering_twice_is_harmless():
    register_strategies()
    register_strategies()
