"""Write a compressed module to a folder and read it back, with no pickle."""

from lightning_memopt.compression.container.errors import CompressedFileError
from lightning_memopt.compression.container.load import load_compressed
from lightning_memopt.compression.container.save import save_compressed

__all__ = ["CompressedFileError", "load_compressed", "save_compressed"]
