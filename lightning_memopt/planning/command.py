"""``lightning-memopt plan``: choose before training, from the command line."""

import argparse
import json
import sys
from ast import literal_eval
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_memopt.planning.plan import PlanResult

NOTHING_FITS = 3


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="choose what to switch on so that a module fits a budget",
        description="Choose the strategy and the techniques with which a LightningModule fits a budget of memory and "
        "trains fastest. Nothing is trained and no device is needed. Exit code 3: nothing fits.",
    )
    parser.add_argument("module", metavar="MODULE", help="the LightningModule, as package.module:Class")
    parser.add_argument("--init", type=_pair, action="append", default=[], metavar="KEY=VALUE", help="its arguments")
    parser.add_argument(
        "--batch-from",
        required=True,
        metavar="DATA",
        help="a LightningDataModule, or a function that gives a loader or a batch, as package.module:Name",
    )
    parser.add_argument(
        "--data-init", type=_pair, action="append", default=[], metavar="KEY=VALUE", help="arguments of DATA"
    )
    parser.add_argument("--budget", metavar="SIZE", help="memory of a device, as 24GiB (default: what it has)")
    parser.add_argument("--devices", type=_count, default=1, metavar="N", help="devices of a node (default: 1)")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="plan for this GPU, as h100 (default: this machine)")
    parser.add_argument("--precision", default="32-true", help="precision of the trainer (default: 32-true)")
    parser.add_argument(
        "--trainer", type=_pair, action="append", default=[], metavar="KEY=VALUE", help="other options of the trainer"
    )
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0, 2 with one line on what to put right, 3 where nothing fits."""
    from lightning.pytorch import Trainer

    from lightning_memopt.planning import plan as planning
    from lightning_memopt.planning.load import check_arguments, load_batch, load_object

    try:
        make = load_object(options.module)
        init = dict(options.init)
        check_arguments(options.module, make, init)
        check_arguments("pl.Trainer", Trainer, dict(options.trainer))
        _check_is_left_to_plan(dict(options.trainer))
        result = planning.plan(
            lambda: make(**init),
            load_batch(options.batch_from, dict(options.data_init)),
            budget=options.budget,
            devices=options.devices,
            nodes=options.nodes,
            device=options.gpu,
            precision=options.precision,
            **dict(options.trainer),
        )
    except ValueError as error:
        print(f"lightning-memopt plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        from lightning_memopt.planning.written import result_as_dict

        print(json.dumps(result_as_dict(result), indent=1))
    else:
        _show(result)
    if result.best is None:
        print(f"lightning-memopt plan: {planning.describe_failure(result)}", file=sys.stderr)
        return NOTHING_FITS
    return 0


def _check_is_left_to_plan(trainer_options: dict[str, Any]) -> None:
    """Refuse options of the trainer that a plan sets."""
    for name in ("accelerator", "strategy", "devices", "num_nodes", "precision", "callbacks"):
        if name in trainer_options:
            raise ValueError(
                f"--trainer {name}={trainer_options[name]} is what a plan says; leave it out, or say with --devices, "
                "--nodes, --gpu and --precision what to plan for"
            )


def _show(result: "PlanResult") -> None:
    from rich.console import Console

    from lightning_memopt.planning.show import table

    console = Console()
    console.print(table(result))
    best = result.best
    if best is not None:
        for sentence in best.bought:
            console.print(f"  {sentence}")
        console.print(f"\n{best.python()}\n\n{best.yaml()}", highlight=False, markup=False)
    for note in result.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return name, literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices; give a whole number from 1 up")
    return int(text)
