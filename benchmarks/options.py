"""What the benchmarks' command lines have in common: rows, a toy size, and a results file."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from results_file import OtherEnvironmentError, ResultsFile


class Options:
    """The command line of a benchmark.

    Args:
        description: The docstring of its script.
        results: Where the figures go unless ``--out`` says otherwise.
        rows: What ``--only`` may name; ``None``: anything, which the script checks.
    """

    def __init__(self, description: str | None, results: Path, rows: Iterable[str] | None = None) -> None:
        self._results = results
        self.parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.parser.add_argument(
            "--only", action="append", choices=rows, metavar="ROW", help="a row; may be given again"
        )
        self.parser.add_argument("--quick", action="store_true", help="toy sizes; needs --out")
        self.parser.add_argument("--out", type=Path, help=f"results file (default: results/{results.name})")

    def add_count(self, name: str, default: int, what: str) -> None:
        """Add the option ``--name`` for how many of something a figure is taken from: two or more."""
        self.parser.add_argument(f"--{name}", type=_two_or_more, default=default, help=what)

    def parse(self) -> argparse.Namespace:
        """Read the command line; what is wrong in it ends the script."""
        options = self.parser.parse_args()
        if options.quick and options.out is None:
            self.parser.error("--quick needs --out: its figures must not replace the real ones")
        options.out = options.out or self._results
        return options


def open_results(path: Path, header: dict[str, Any]) -> ResultsFile:
    """The results file; one of another machine ends the script."""
    try:
        return ResultsFile(path, header)
    except OtherEnvironmentError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


def _two_or_more(text: str) -> int:
    count = int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"{count}: a median with quartiles needs 2 or more")
    return count
