"""What a user meets first: importing the package and the names it promises."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_memopt

ROOT = Path(__file__).parent.parent


def _run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_importing_the_package_loads_no_more_than_its_own_first_page_and_the_names_of_strategies():
    loaded = _run(
        "import sys, lightning.pytorch\n"
        "before = set(sys.modules)\n"
        "import lightning_memopt\n"
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    assert loaded == ["lightning_memopt", "lightning_memopt.__about__", "lightning_memopt.registration"]


@pytest.mark.parametrize("name", [n for n in lightning_memopt.__all__ if n != "__version__"])
def test_a_public_name_loads_and_has_a_docstring(name):
    assert getattr(lightning_memopt, name).__doc__


TECHNIQUES_FROM_THE_LITERATURE = [
    "ActivationCheckpointing", "ActivationOffload", "ChunkedLoss", "DataParallelStrategy", "GradientAccumulation",
    "HalfPrecision", "LowBitOptimizer", "MicroBatching", "MixedPrecision", "OptimizerInBackward",
    "PipelineParallelStrategy", "PolynomialSparsity", "TensorParallelStrategy", "chunked_cross_entropy",
]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in lightning_memopt.__all__ if n != "__version__"])
def test_a_docstring_describes_each_argument(name):
    public = getattr(lightning_memopt, name)
    given = inspect.signature(public).parameters.values()
    described = inspect.getdoc(public)
    arguments = [p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert not [argument for argument in arguments if not re.search(rf"^ *{argument}\b.*:", described, re.MULTILINE)]


@pytest.mark.parametrize("name", TECHNIQUES_FROM_THE_LITERATURE)
def test_a_docstring_says_where_the_technique_comes_from(name):
    assert re.search("https://arxiv.org/abs/|issues? [0-9]+", inspect.getdoc(getattr(lightning_memopt, name)))


PAGES = {
    "activation_checkpointing": "ActivationCheckpointing",
    "activation_offload": "ActivationOffload",
    "chunked_loss": "ChunkedLoss",
    "gradient_accumulation": "GradientAccumulation",
    "low_bit_optimizer": "LowBitOptimizer",
    "micro_batching": "MicroBatching",
    "optimizer_in_backward": "OptimizerInBackward",
    "precision": "MixedPrecision",
}


@pytest.mark.parametrize("page", PAGES)
def test_each_technique_has_a_page_with_its_savings_cost_source_and_limits(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert PAGES[page] in text
    missing = [said for said in ("saves", "costs", "When not to use it", "https://") if said not in text]
    assert not missing


def test_using_every_public_name_loads_no_optional_library_that_lightning_does_not_load_itself():
    optional = ["matplotlib", "torchao", "bitsandbytes", "torch_pruning", "transformers"]
    loaded = _run(
        "import sys, lightning.pytorch\n"
        "before = set(sys.modules)\n"
        "import lightning_memopt as memopt\n"
        "[getattr(memopt, name) for name in memopt.__all__]\n"
        "print(*(set(sys.modules) - before))"
    ).split()
    assert not [name for name in optional if name in loaded]


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="no attribute 'Banana'"):
        _ = lightning_memopt.Banana


def test_the_lower_layers_do_not_import_lightning():
    offenders = [
        path.relative_to(ROOT).as_posix()
        for layer in ("models", "memory", "techniques", "parallel", "compression")
        for path in (ROOT / "lightning_memopt" / layer).rglob("*.py")
        if re.search(r"^\s*(import|from) lightning(\.|\s)", path.read_text(), re.MULTILINE)
    ]
    assert not offenders


def test_layers_import_downward_only():
    order = [
        "models", "memory", "parallel", "techniques", "compression", "planning",
        "callbacks", "precision", "strategies", "demo",
    ]  # fmt: skip
    allowed_sideways = {("callbacks", "precision"), ("precision", "callbacks")}
    upward = []
    for height, layer in enumerate(order):
        for path in (ROOT / "lightning_memopt" / layer).rglob("*.py"):
            for target in re.findall(r"from lightning_memopt\.(\w+)", path.read_text()):
                if target in order[height + 1 :] and (layer, target) not in allowed_sideways:
                    upward.append(f"{path.relative_to(ROOT)} imports {target}/")
    assert not upward


def test_the_version_is_one_that_the_changelog_knows_or_unreleased():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{lightning_memopt.__version__}]" in changelog or "[Unreleased]" in changelog
