"""``lightning-memopt demo``: its options, and the demo from start to end."""

import argparse
import time
from pathlib import Path
from typing import Any

from lightning_memopt.demo.presets import PRESETS, TECHNIQUES


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add ``demo`` to the command line; torch is imported when the demo runs, so that ``--help`` is quick."""
    parser = commands.add_parser(
        "demo",
        help="train a small GPT plainly and with the techniques on, and compare",
        description="Train a small GPT on the source of Python's standard library, plainly and with the techniques "
        "on, and compare memory, time and validation loss.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="small", help="size of the model (default: small)")
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="optimizer steps of each run (default: the preset's)"
    )
    parser.add_argument(
        "--techniques",
        type=_techniques,
        metavar="NAME[,NAME...]",
        default=list(TECHNIQUES),
        help=f"what to switch on (default: {','.join(TECHNIQUES)})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("memopt_demo"),
        help="folder for the picture and the results (default: memopt_demo)",
    )
    parser.set_defaults(run=run, fail=parser.error)


def run(options: argparse.Namespace) -> int:
    """Run the demo and print what it found; what the user has to put right goes to ``options.fail``, as one line."""
    _check_writable(options)
    began = time.monotonic()

    from rich.console import Console

    from lightning_memopt.demo import show
    from lightning_memopt.demo.bar import step_bar
    from lightning_memopt.demo.compress import compress
    from lightning_memopt.demo.data import standard_library
    from lightning_memopt.demo.run import run as train

    console = Console()
    preset = PRESETS[options.preset]
    steps = options.steps or preset.steps
    try:
        corpus = standard_library()
    except ValueError as error:
        options.fail(str(error))
    console.print(
        f"Training on {len(corpus.training) / 1e6:.1f} MB of Python's standard library, {steps} steps of "
        f"{preset.batch_size} x {preset.context} bytes; {corpus.files[1]} of {sum(corpus.files)} files are held out."
    )

    runs: dict[str, list[str]] = {"plain": [], "memopt": options.techniques}
    with step_bar(console, list(runs), steps) as progress:
        plain, other = (
            train(name, preset, corpus, techniques=on, steps=steps, seed=options.seed, progress=progress)
            for name, on in runs.items()
        )
    console.print(show.table(plain, other, title="One step of the same training, and what it led to"))
    report = compress(other, preset, corpus, seed=options.seed, folder=options.out)
    console.print("Then half of its weights are set to zero, the rest packed in 8 bits, written and read back:")
    console.print(report)
    picture = show.write_picture([plain, other], options.out)
    seconds = time.monotonic() - began
    results = show.write_results(
        [plain, other],
        options.out,
        compression=report,
        preset_name=options.preset,
        preset=preset,
        steps=steps,
        seed=options.seed,
        seconds=seconds,
    )
    if picture is None:
        console.print("No picture: matplotlib is not installed (pip install 'lightning-memopt[plot]').")
    else:
        console.print(f"Timelines: {picture}")
    console.print(f"Results:   {results}")
    console.print(f"It took {seconds:.0f} s in all.")
    return 0


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps; give a whole number from 1 up")
    return value


def _techniques(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in TECHNIQUES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is not a technique of the demo; it has {', '.join(TECHNIQUES)}"
        )
    return list(dict.fromkeys(names))


def _check_writable(options: argparse.Namespace) -> None:
    """Fail before minutes of training rather than after."""
    probe = options.out / ".writable"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        options.fail(f"--out {options.out} cannot be written to ({error.strerror}); name another folder")
