"""Draw a picture and write it, without touching the user's backend, open figures or style."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def drawn_to(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure to draw on, which is written to ``path`` when the block ends well.

    Args:
        path: PNG file to write; missing folders are made.
        width: In inches.
        height: In inches.

    Raises:
        ValueError: ``path`` is not a ``.png`` file.
        ModuleNotFoundError: matplotlib is missing; it comes with the extra ``lightning-memopt[plot]``.
    """
    path = Path(path)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"path is {str(path)!r}: pictures are drawn as PNG, give the name of a .png file")
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"drawing needs {error.name}, which is not installed: pip install 'lightning-memopt[plot]'",
            name=error.name,
        ) from error
    with style.context("default"):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_png(str(path))
