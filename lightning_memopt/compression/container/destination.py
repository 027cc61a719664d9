"""Say before anything is computed that a folder cannot be written."""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from lightning_memopt.compression.container.extra_state import read_extra
from lightning_memopt.compression.container.files import check_replaceable
from lightning_memopt.compression.container.save import named_tensors
from lightning_memopt.compression.container.tensors import type_name


def check_types(module: nn.Module) -> None:
    """Raise where a tensor of ``module`` has a type that no file holds, or a module extra state that none does.

    Raises:
        ValueError: Names it.
    """
    read_extra(module)
    for name, tensor in named_tensors(module):
        type_name(name, tensor)


def check_destination(path: str | Path) -> None:
    """Raise where :func:`~lightning_memopt.compression.container.save_compressed` could not write to ``path``.

    Raises:
        ValueError: It is a file, holds something else than a compressed module, or its folder cannot be written.
    """
    folder = Path(path).resolve()
    if folder.is_dir():
        check_replaceable(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{path}` is a file, and a compressed module is a folder. Name another.")
    above = next(part for part in folder.parents if part.exists())
    if not above.is_dir():
        raise ValueError(f"`{path}` cannot be made, since `{above}` is a file. Name another folder.")
    try:
        TemporaryDirectory(dir=above).cleanup()  # permissions do not tell all, such as full or special file systems
    except OSError as error:
        raise ValueError(f"`{path}` cannot be made in `{above}`: {error.strerror}. Name another folder.") from error
