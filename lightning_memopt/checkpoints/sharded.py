"""A sharded checkpoint: a directory of ``torch.distributed.checkpoint``, and one file for the rest.

Weights lie under ``weights/NAME``, those that training goes on with where these are averages under
``current_model_state/NAME``, and optimizer state under ``optimizer/NUMBER/PARAMETER/KEY``, by the names that the
user wrote. The file (``rest.ckpt``) is the remainder of Lightning's checkpoint; under ``memopt_sharded`` it says how
the optimizers number their parameters and which names are tied. Nothing is read that could run code: the index that
torch pickles may name only the classes that it is made of, and there are no entries but tensors.
"""

import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_memopt.checkpoints.atomic import MANIFEST, is_whole

REST = "rest.ckpt"
ABOUT = "memopt_sharded"

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


BESIDE = ("current_model_state",)
"""Keys of Lightning's checkpoint that hold a ``state_dict`` of the module too: what its averages were made of."""


def weight_key(name: str, state: str = "weights") -> str:
    """Where the weight ``name`` lies; of the ``state_dict``, or of the ``state`` beside it."""
    return f"{state}/{name}"


def state_key(optimizer: int, parameter: str, key: str) -> str:
    """Where ``key`` of the optimizer's state of ``parameter`` lies."""
    return f"optimizer/{optimizer}/{parameter}/{key}"


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a sharded checkpoint, whole or not."""
    return Path(path).is_dir() and any((Path(path) / name).exists() for name in (MANIFEST, REST))


class ShardedCheckpoint:
    """Reads a sharded checkpoint tensor by tensor, in one process.

    Args:
        path: Its directory.
        weights_only: ``False`` unpickles whatever objects it has beside tensors, which runs what code they name: for
            files that you trust.

    Raises:
        ValueError: No sharded checkpoint, one that was not written to its end, or one that has such objects.
    """

    def __init__(self, path: str | os.PathLike[str], weights_only: bool = True) -> None:
        self.path = Path(path)
        if not is_sharded(path):
            raise ValueError(
                f"`{path}` is no checkpoint: a directory without {MANIFEST}. Give one that was saved "
                'with `save="sharded"`, or a file.'
            )
        if not is_whole(path):
            raise ValueError(
                f"`{path}` was not written to its end: files are missing or shorter than its {MANIFEST} "
                "says. `lightning_memopt.latest_checkpoint` finds the newest whole one."
            )
        try:
            rest = torch.load(self.path / REST, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"`{path}` has more beside its tensors than numbers and names, hyperparameters perhaps: "
                f"{str(error).splitlines()[0]} If you trust it, `trainer.fit(..., weights_only=False)` reads it."
            ) from error
        self.rest: dict[str, Any] = rest
        self.about: dict[str, Any] = self.rest.pop(ABOUT)
        self._reader = _Reader(self.path)
        self.tensors: dict[str, Any] = self._reader.read_metadata().state_dict_metadata

    def read(self, key: str, into: Tensor | None = None) -> Tensor:
        """The whole tensor at ``key``, on the CPU; written to ``into`` if given."""
        about = self.tensors[key]
        into = torch.empty(about.size, dtype=about.properties.dtype) if into is None else into
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")  # it is
            dcp.load({key: into}, storage_reader=self._reader, planner=planner, no_dist=True)
        return into

    @property
    def states(self) -> dict[str, Mapping[str, Any]]:
        """By where they lie, what is told of the ``state_dict`` and of those that are beside it."""
        return {"weights": self.about, **self.about.get("beside", {})}

    def weights(self, state: str = "weights") -> dict[str, Any]:
        """The ``state_dict`` of the module, or the ``state`` beside it: whole tensors, tied ones still tied."""
        about = self.states[state]
        values: dict[str, Any] = {}
        for name, first in about["weights"].items():
            if name in about["plain_weights"]:
                values[name] = about["plain_weights"][name]
            else:
                values[name] = values[first] if first in values else self.read(weight_key(first, state))
        return values

    def optimizer_states(self) -> list[dict[str, Any]]:
        """As Lightning's ``optimizer_states``; the tensors are read one by one when they are asked for."""
        return [
            {"state": self._entries(number, about), **about["others"]}
            for number, about in enumerate(self.about["optimizers"])
        ]

    def _entries(self, number: int, about: Mapping[str, Any]) -> "_Lazy":
        def entry(parameter: str) -> _Lazy:
            plain = about["plain"].get(parameter, {})
            return _Lazy(
                {
                    key: plain[key] if key in plain else _Stored(self, state_key(number, parameter, key))
                    for key in about["order"][parameter]
                }
            )

        entries = {index: entry(name) for index, name in about["names"].items() if name in about["order"]}
        return _Lazy({**entries, **about["unnamed"]})

    def checkpoint(self, lazily: bool = False) -> dict[str, Any]:
        """Lightning's whole checkpoint.

        Args:
            lazily: Leave optimizer state where it is; its mappings read each tensor when it is asked for.
        """
        beside = {state: self.weights(state) for state in self.states if state != "weights"}
        checkpoint = {**self.rest, "state_dict": self.weights(), **beside}
        if self.about["optimizers"]:
            states = self.optimizer_states()
            checkpoint["optimizer_states"] = states if lazily else [_read(state) for state in states]
        return checkpoint


def full_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The weights in any checkpoint, by the names that the user wrote, whole and on the CPU.

    Args:
        path: A checkpoint file, of this package or Lightning's own, or a sharded directory. Nothing in it is run
            (``weights_only=True``). A file's tensors are mapped, so they cost memory once they are used.

    Returns:
        ``{name: tensor}``, for ``module.load_state_dict``. Tied weights share memory.

    Raises:
        ValueError: No checkpoint, one that was not written to its end, or one with objects that are no plain values.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"weight": torch.ones(2)}}, f"{folder}/last.ckpt")
        ...     full_state_dict(f"{folder}/last.ckpt")
        {'weight': tensor([1., 1.])}
    """
    if Path(path).is_dir():
        return ShardedCheckpoint(path).weights()
    if not is_whole(path):
        raise ValueError(f"`{path}` is no whole checkpoint file: it is missing, or was not written to its end.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{path}` holds more than tensors and plain values, which is not read because it could run code: "
            f"{error} Save it without such objects (`save_hyperparameters(ignore=...)`), or allow them by "
            "`torch.serialization.add_safe_globals`."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"`{path}` has no `state_dict`, so it is no checkpoint that Lightning wrote.")
    return dict(checkpoint["state_dict"])


class _Stored:
    """A tensor that is not read yet."""

    def __init__(self, checkpoint: ShardedCheckpoint, key: str) -> None:
        self.checkpoint = checkpoint
        self.key = key


class _Lazy(Mapping[Any, Any]):
    """A mapping whose stored tensors are read each time they are asked for, and not kept."""

    def __init__(self, values: Mapping[Any, Any]) -> None:
        self.values_or_keys = dict(values)

    def __getitem__(self, key: Any) -> Any:
        value = self.values_or_keys[key]
        return value.checkpoint.read(value.key) if isinstance(value, _Stored) else value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values_or_keys)

    def __len__(self) -> int:
        return len(self.values_or_keys)


def _read(value: Any) -> Any:
    return {key: _read(part) for key, part in value.items()} if isinstance(value, dict | _Lazy) else value


class _Reader(dcp.FileSystemReader):
    """Reads the index once, with classes that are data only."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            index = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
            others = [k for k, v in index.state_dict_metadata.items() if not isinstance(v, TensorStorageMetadata)]
            if others:
                raise ValueError(
                    f"`{self.path}` has entries that are no tensors ({others[0]!r}, ...), which are not "
                    "read because they could run code. It was not saved by this package."
                )
            self._index = index
        return self._index


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED and not (module == "torch" and _is_dtype(name)):
            raise ValueError(
                f"The index of the checkpoint names {module}.{name}, which is none of the classes that "
                "it is made of: it was changed, or not written by torch.distributed.checkpoint."
            )
        return super().find_class(module, name)
