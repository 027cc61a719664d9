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


MAY_IMPORT = {
    "models": "",
    "memory": "models",
    "parallel": "models",
    "techniques": "models memory parallel",
    "compression": "models memory parallel",
    "checkpoints": "parallel",
    "planning": "models memory parallel techniques",
    "callbacks": "models memory parallel techniques compression planning",
    "precision": "models memory parallel techniques compression planning",
    "strategies": "models memory parallel techniques compression planning checkpoints callbacks",
}
"""What a layer may import of the others, as CONTRIBUTING.md says; the command line imports everything."""

WITHOUT_LIGHTNING = ("models", "memory", "parallel", "techniques", "compression", "checkpoints")


def _imports(layer: str, package: str) -> dict[str, set[str]]:
    """What each file of a layer imports from ``package``, by the first name below it."""
    pattern = re.compile(rf"^\s*(?:from|import) {package}(?:\.(\w+)|\b)", re.MULTILINE)
    files = (ROOT / "lightning_memopt" / layer).rglob("*.py")
    return {str(path.relative_to(ROOT)): set(pattern.findall(path.read_text())) for path in files}


@pytest.mark.parametrize("layer", WITHOUT_LIGHTNING)
def test_the_lower_layers_do_not_import_lightning(layer):
    assert not [path for path, imported in _imports(layer, "lightning").items() if imported]


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layers_import_downward_only(layer):
    others = {*MAY_IMPORT, "demo", "doctor", "cli"} - {layer, *MAY_IMPORT[layer].split()}
    if layer != "planning":  # which tries callbacks and strategies by their public names
        others.add("")
    imports = _imports(layer, "lightning_memopt")
    assert imports
    assert {path: imported & others for path, imported in imports.items() if imported & others} == {}


def test_every_layer_has_its_rule():
    folders = {path.parent.name for path in (ROOT / "lightning_memopt").glob("*/__init__.py")}
    assert folders == {*MAY_IMPORT, "demo", "doctor"}


def test_the_version_is_one_that_the_changelog_knows_or_unreleased():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{lightning_memopt.__version__}]" in changelog or "[Unreleased]" in changelog
