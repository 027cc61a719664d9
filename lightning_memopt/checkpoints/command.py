"""``lightning-memopt consolidate``: one file from a sharded checkpoint."""

import argparse
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the command line's."""
    parser = commands.add_parser(
        "consolidate",
        help="make one file of a sharded checkpoint",
        description="Make one file of a sharded checkpoint, tensor by tensor, without the ranks that wrote it.",
    )
    parser.add_argument("directory", metavar="DIR", help="a checkpoint that was saved as shards")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--safetensors", action="store_true", help="the weights only, as safetensors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0, or 2 with one line that says why it cannot be."""
    from lightning_memopt.checkpoints.consolidate import consolidate, consolidate_to_safetensors

    write = consolidate_to_safetensors if options.safetensors else consolidate
    try:
        write(options.directory, options.out)
    except (ValueError, OSError) as error:
        print(f"lightning-memopt consolidate: {error}", file=sys.stderr)
        return 2
    return 0
