"""The demo's progress bar: one line a run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_memopt.demo.run import Progress as Report


@contextmanager
def step_bar(console: Console, names: Sequence[str], steps: int) -> Iterator[Report]:
    """Show a bar of ``steps`` for each run named; yields what a run reports to.

    Args:
        console: Where to draw.
        names: Names of the runs, in order.
        steps: Steps of each.
    """
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=steps, start=False, text="") for name in names}

        def report(name: str, done: int, text: str) -> None:
            task = progress.tasks[tasks[name]]
            if not task.started:
                progress.start_task(task.id)
            progress.update(task.id, completed=done, text=text)
            if done == 0 and not console.is_terminal:  # where no bar can be drawn, a log should show some life
                console.print(f"{name}: {text}")

        yield report
