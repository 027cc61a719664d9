"""``lightning-memopt compress``: prune and quantize a checkpoint by a recipe, and write it small."""

import argparse
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the command line's."""
    parser = commands.add_parser(
        "compress",
        help="prune and quantize a checkpoint by a recipe",
        description="Prune and quantize the module of a checkpoint by a recipe in YAML, and write a folder that "
        "load_compressed reads. A recipe: {prune: {amount: 0.8, scope: global}, quantize: int8}.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint that Lightning saved")
    parser.add_argument(
        "--module",
        metavar="PACKAGE:CLASS",
        help="the class of its LightningModule; without it, that in the recipe (`module:`), or the recorded one",
    )
    parser.add_argument("--recipe", required=True, metavar="YAML", help="what to do")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--onnx", metavar="FILE", help="write the module as ONNX too")
    parser.add_argument("--executorch", metavar="FILE", help="write the module as an ExecuTorch program too")
    parser.add_argument("--report", metavar="JSON", help="write what it did to this file too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0, or 2 with one line that says why it cannot be."""
    try:
        _compress(options)
    except Exception as error:  # of the user's own code too, which runs here
        said = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError):  # which name what is wrong; others may say a word
            said = f"{type(error).__name__}: {said}"
        print(f"lightning-memopt compress: {said}", file=sys.stderr)
        return 2
    return 0


def _compress(options: argparse.Namespace) -> None:
    from dataclasses import replace
    from pathlib import Path

    from rich.console import Console

    from lightning_memopt.checkpoint_module import load_module
    from lightning_memopt.compression.container import save_compressed
    from lightning_memopt.compression.container.destination import check_destination
    from lightning_memopt.compression.executorch import export_executorch
    from lightning_memopt.compression.onnx import export_onnx
    from lightning_memopt.compression.recipe import Recipe
    from lightning_memopt.models.example import call_with

    recipe = Recipe.from_yaml(options.recipe)
    check_destination(options.out)
    if options.report is not None:
        _check_file("report", options.report)
    module = load_module(options.checkpoint, options.module or recipe.module)
    inputs = getattr(module, "example_input_array", None)
    programs = [(option, path) for option in ("onnx", "executorch") if (path := getattr(options, option)) is not None]
    for option, path in programs:
        _check_program(option, path, module, inputs)
    report = recipe.apply(module, None if inputs is None else lambda module: call_with(module, inputs))
    folder = save_compressed(module, options.out)
    written = sum(file.stat().st_size for file in folder.iterdir())
    report = replace(report, disk_bytes_after=written)
    for option, path in programs:
        (export_onnx if option == "onnx" else export_executorch)(module, inputs, path)
    if options.report is not None:
        Path(options.report).parent.mkdir(parents=True, exist_ok=True)
        Path(options.report).write_text(report.to_json() + "\n")
    Console().print(report)


def _check_program(option: str, path: str, module: Any, inputs: Any) -> None:
    """Raise, before anything is done, where the program cannot be written when all of it is."""
    from lightning_memopt.compression.executorch import require_executorch
    from lightning_memopt.compression.onnx import require_onnx

    (require_onnx if option == "onnx" else require_executorch)()
    if inputs is None:
        raise ValueError(f"--{option} needs inputs to run on; give {type(module).__name__} an example_input_array")
    if option == "executorch" and isinstance(inputs, dict):
        raise ValueError(f"--executorch takes positional inputs; {type(module).__name__} has a dict of named ones")
    _check_file(option, path)


def _check_file(option: str, path: str) -> None:
    from pathlib import Path

    if Path(path).is_dir():
        raise ValueError(f"--{option} {path} is a folder; name a file")
