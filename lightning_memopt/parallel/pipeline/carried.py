"""Values that pass blocks by: what is used behind a later block without having been handed to it as an argument.

A stage is sent what modules returned before it, which takes the place of what they return on it, without data. What
follows from that is computed again there: the step is run whole on each stage.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_leaves, tree_unflatten

from lightning_memopt.parallel.pipeline.stubs import is_stub

Output = tuple[str, int]
"""The name of a module that a step calls once, and the number of a leaf of what it returns."""


def put(values: Mapping[Output, Tensor], name: str, output: Any) -> Any:
    """What module ``name`` returned, with those of ``values`` in it that are of it; ``None`` where none is."""
    own = {number: value for (module, number), value in values.items() if module == name}
    if not own:
        return None
    leaves, tree = tree_flatten(output)
    return tree_unflatten([own.get(number, leaf) for number, leaf in enumerate(leaves)], tree)


class Origins:
    """Of each stub of a run, the outputs of modules from which it can be computed again.

    Told of all that happens in the run, with the number of links called so far (``position``), and the one that is
    running, if one is.

    Attributes:
        values: What was returned.
    """

    def __init__(self) -> None:
        self.values: dict[Output, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._returned: dict[int, list[tuple[int, int | None, Output]]] = defaultdict(list)  # by id of the value
        self._made: dict[int, tuple[int | None, tuple[int, ...]]] = {}  # within which link, from what
        self._not_again: set[int] = set()
        self._written: list[tuple[int, int, tuple[int, ...]]] = []
        self._sharing: dict[int, set[int]] = defaultdict(set)

    def returned(self, name: str, output: Any, position: int, within: int | None) -> None:
        """Module ``name``, which is part of link ``within`` and not the link itself, returned ``output``."""
        self._calls[name] += 1
        for number, leaf in enumerate(tree_leaves(output)):
            if is_stub(leaf):
                self.values[name, number] = leaf
                self._returned[id(leaf)].append((position, within, (name, number)))
                self._sharing[leaf.untyped_storage()._cdata].add(id(leaf))

    def heard(self, func: Any, args: Any, kwargs: Any, result: Any, position: int, running: int | None) -> None:
        """An operator ran on stubs."""
        parents = tuple(id(value) for value in tree_iter((args, kwargs)) if is_stub(value))
        is_again = not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and is_stub(value):
                    self._overwrite(value, position, parents)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._made.setdefault(id(value), (running, parents))  # of one written in place, as it was before
                self._sharing[value.untyped_storage()._cdata].add(id(value))
                if not is_again:
                    self._not_again.add(id(value))

    def _overwrite(self, value: Tensor, position: int, parents: tuple[int, ...]) -> None:
        """What was returned is no longer that, and sent as it is now would be written to a second time."""
        self._written.append((position, id(value), parents))
        for alias in self._sharing[value.untyped_storage()._cdata]:
            self._returned.pop(alias, None)
            self._not_again.add(alias)

    def find(self, value: Tensor, cut: int) -> tuple[set[Output], set[int]] | None:
        """The outputs from which ``value`` can be computed again on a stage that begins with link ``cut``, and the
        links within which it is; ``None`` where it cannot be."""
        outputs: set[Output] = set()
        links: set[int | None] = set()
        pending, seen = [id(value)], set[int]()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            once = [
                (within, output)
                for position, within, output in self._returned.get(current, ())
                if position <= cut and self._calls[output[0]] == 1
            ]
            if once:
                within, output = once[0]
                outputs.add(output)
            elif current in self._made and current not in self._not_again:
                within, parents = self._made[current]
                pending += parents
            else:
                return None
            links.add(within)
        return outputs, {link for link in links if link is not None}

    def are_overwritten(self, outputs: Iterable[Output], cut: int) -> bool:
        """Whether on a stage that begins with link ``cut`` and is sent ``outputs``, what follows from them would be
        written into from values that the stage lacks."""
        has_data = {id(self.values[output]) for output in outputs}
        for value, (_, parents) in self._made.items():
            if parents and has_data.issuperset(parents):
                has_data.add(value)
        return any(
            position <= cut and value in has_data and not has_data.issuperset(parents)
            for position, value, parents in self._written
        )
