"""The command line: ``lightning-memopt COMMAND``. Each command lives with the part that it shows."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_memopt import compress_command as compress
from lightning_memopt.__about__ import __version__
from lightning_memopt.checkpoints import command as consolidate
from lightning_memopt.demo import command as demo
from lightning_memopt.doctor import command as doctor
from lightning_memopt.memory import command as report
from lightning_memopt.planning import command as plan

USAGE_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a ``--help`` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; those of this process when left out.

    Returns:
        The exit code: 0, 2 for what the user can put right, 3 where no plan fits, 130 after Ctrl-C.
    """
    parser = _Parser(prog="lightning-memopt", description="Memory optimization for any LightningModule.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_parser(commands)
    consolidate.add_parser(commands)
    compress.add_parser(commands)
    doctor.add_parser(commands)
    report.add_parser(commands)
    plan.add_parser(commands)
    options = parser.parse_args(arguments)
    # torch 2.13's profiler writes two lines each time it starts; it reads its log level once, when torch is loaded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
