"""Fixtures that put back what a test may have changed."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DISTRIBUTED_FOLDERS = [Path(__file__).parent / name for name in ("strategies", "parallel")]


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of the strategies, and of what they are built on, count as distributed."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in DISTRIBUTED_FOLDERS):
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(autouse=True)
def _restore_torch_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Each test draws the same numbers whichever ran before; default dtype, gradient mode and folder are put back."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device, or a skip that says it is missing."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")
    return torch.device("cuda")
