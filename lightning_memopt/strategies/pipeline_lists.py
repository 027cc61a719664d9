"""What steps append to lists of the module (``self.outputs.append(loss)``), for each batch and on every rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_any, tree_leaves

from lightning_memopt.parallel.pipeline.stubs import is_stub
from lightning_memopt.parallel.refusal import StepRefused
from lightning_memopt.techniques.batches import detached, merge_outputs


class AppendedToLists:
    """Collects it from the micro-batches of one batch, and leaves the lists without it until :meth:`extend`.

    A step ends before it has appended on every stage but the last, and appends for each micro-batch there.

    Args:
        module: Its attributes that are lists are looked at.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._of_micro_batches: list[dict[str, list[Any]]] = []
        self._made: dict[str, list[Any]] = {}  # lists that steps of this batch made

    @contextmanager
    def step(self, is_last: bool) -> Iterator[None]:
        """Around a run of the step on one micro-batch; ``is_last``: on the last stage."""
        before = set(vars(self._module))
        lists = {name: (value, len(value)) for name, value in vars(self._module).items() if isinstance(value, list)}
        appended = {}
        try:
            yield
        finally:
            for name in [name for name, value in self._made.items() if vars(self._module).get(name) is not value]:
                self._forget(name)
            for name in set(vars(self._module)) - before:
                if isinstance(value := getattr(self._module, name), list):
                    self._made[name] = value
                    lists[name] = value, 0
            for name, (value, length) in lists.items():
                if len(value) > length:
                    appended[name] = value[length:]
                    del value[length:]
            if is_last:
                self._of_micro_batches.append(detached(appended))

    def _forget(self, name: str) -> None:
        """Of a list that each step makes anew, and so does not append to."""
        del self._made[name]
        for appended in self._of_micro_batches:
            appended.pop(name, None)

    def merged(self, sizes: Sequence[int | None], weights: Sequence[float | Tensor]) -> dict[str, list[Any]]:
        """On the last stage: what was appended to each list, as for the whole batch where that can be made of it.

        Raises:
            StepRefused: A tensor that comes from an earlier stage, and has no data here.
        """
        names = dict.fromkeys(name for appended in self._of_micro_batches for name in appended)
        for name in names:
            if tree_any(is_stub, [appended.get(name) for appended in self._of_micro_batches]):
                raise StepRefused(
                    f"the step appends to `{name}` a value that is computed before the last stage, which has no "
                    "values of it; append what the loss is computed from."
                )
        return {
            name: _merge([appended.get(name, []) for appended in self._of_micro_batches], sizes, weights)
            for name in names
        }

    def extend(self, appended: dict[str, list[Any]]) -> None:
        """Append to the lists what the last stage has merged; where no step made one, it is made."""
        for name, items in appended.items():
            if not hasattr(self._module, name):
                setattr(self._module, name, [])
            getattr(self._module, name).extend(items)


def can_be_sent(item: Any) -> bool:
    """Whether ``item`` is made of tensors and plain values, which every rank can be given."""
    return all(isinstance(leaf, Tensor | int | float | str | bytes | None) for leaf in tree_leaves(item))


def _merge(pieces: list[list[Any]], sizes: Sequence[int | None], weights: Sequence[float | Tensor]) -> list[Any]:
    if len({len(piece) for piece in pieces}) == 1:
        merged: list[Any] = merge_outputs(pieces, sizes, weights)
        pairs = zip(merged, pieces[0], strict=True)
        if not any(isinstance(item, list) and not isinstance(of_one, list) for item, of_one in pairs):
            return merged
    return [item for piece in pieces for item in piece]  # counts, say, of which users make the sum
