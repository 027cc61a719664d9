"""What the README, the pages and the docstrings show runs as it is shown."""

import doctest
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from tests.distributed import run_on_ranks

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_memopt"

NOT_HERE = ("num_nodes=", "ray.train", 'device="h100"')
"""What only other machines can run: such a block is read, and the names that it takes from the package looked up."""

RANKS = {"checkpoints.md": 4}
"""Pages that train on several."""

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


class MyModule(BoringModel):
    """Stands for the reader's module."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(layers))
        self.layer = nn.Sequential(*blocks, nn.Linear(64, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class MyData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(32, 64), batch_size=8)


def _pages() -> list[Path]:
    return [
        page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())
    ]


def _run(page: Path) -> None:
    """All blocks of one page, in order and in one module, as who reads it would."""
    shown = sys.modules["shown"] = ModuleType("shown")  # where classes of the page are looked for by their names
    shown.__dict__.update(
        pl=pl, memopt=memopt, MyModule=MyModule, module=MyModule(), batch=torch.randn(8, 64), datamodule=MyData()
    )
    text = page.read_text()
    for block in BLOCK.finditer(text):
        # With the line numbers of the page.
        code = compile("\n" * text.count("\n", 0, block.start(1)) + block[1], str(page), "exec")
        if any(needed in block[1] for needed in NOT_HERE):
            for name in re.findall(r"\bmemopt\.(\w+)", block[1]):
                assert hasattr(memopt, name), f"{page.name} shows memopt.{name}"
        else:
            exec(code, shown.__dict__)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that say nothing of how long they train stop after an epoch, and none looks for a GPU."""
    for option, value in {"max_epochs": "1", "accelerator": "cpu", "enable_progress_bar": "False"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{option.upper()}", value)
    monkeypatch.delitem(sys.modules, "shown", raising=False)


@pytest.mark.parametrize("page", [page for page in _pages() if page.name not in RANKS], ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, short: None) -> None:
    _run(page)


@pytest.mark.distributed
@pytest.mark.parametrize("page", [page for page in _pages() if page.name in RANKS], ids=lambda page: page.name)
def test_what_a_page_shows_of_several_ranks_runs_on_so_many(page: Path, short: None) -> None:
    run_on_ranks(_run, RANKS[page.name], page)


def _with_examples() -> list[str]:
    """Modules of the package, of which some docstring has an example."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text())
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", _with_examples())
def test_examples_of_docstrings_run_and_give_what_they_say(name: str) -> None:
    shown = [text for text in doctest.DocTestFinder().find(import_module(name), name) if text.examples]
    assert shown
    runner = doctest.DocTestRunner()
    for text in shown:
        runner.run(text)
    assert not runner.failures
