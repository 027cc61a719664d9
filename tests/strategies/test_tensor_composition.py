"""Single-device techniques inside tensor parallel training: the numbers of one device."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.parity import fit_zoo
from tests.strategies.test_data_composition import TECHNIQUES as OF_DATA_PARALLEL
from tests.strategies.test_data_composition import TOLERANCE
from tests.zoo import ZOO

TECHNIQUES: dict[str, Callable[[], dict[str, Any]]] = {
    **OF_DATA_PARALLEL,
    "checkpointing_budget": lambda: {"extra": [memopt.ActivationCheckpointing("budget", budget=0.5)]},
    "bf16_mixed": lambda: {"precision": "bf16-mixed"},
    "half_kahan": lambda: {"plugins": [memopt.HalfPrecision("bf16", rounding="kahan")]},
    "clip_by_value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}
TENSOR = {"strategy": "memopt_tp", "sizes": MeshSizes(tensor=2)}


FEW = ("checkpointing_selective", "chunked_loss", "bf16_mixed")


@pytest.mark.parametrize(
    ("zoo", "techniques"),
    [
        pytest.param("gpt2", FEW, id="few"),
        pytest.param("gpt2", tuple(TECHNIQUES), id="gpt2", marks=pytest.mark.slow),
        pytest.param("llama", tuple(TECHNIQUES), id="llama", marks=pytest.mark.slow),
    ],
)
def test_each_technique_gives_the_losses_of_one_device(zoo, techniques):
    def losses(ranks: int, **strategy: Any) -> dict[str, np.ndarray]:
        return {name: fit_zoo(ZOO[zoo], ranks, 4, **strategy, **TECHNIQUES[name]()).losses for name in techniques}

    one_device = run_on_ranks(lambda: losses(1), 1, deadline_seconds=120)[0]
    for two_ranks in run_on_ranks(lambda: losses(2, **TENSOR), 2, deadline_seconds=240):
        for name, expected in one_device.items():
            tolerance = TOLERANCE.get(name, 1e-3 if "16" in name or "half" in name else 1e-5)
            np.testing.assert_allclose(two_ranks[name], expected, rtol=tolerance, err_msg=name)
