"""Fake sparse tensors with as many elements as the real ones: torch's fake kernels make theirs with none."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_memopt.memory.arguments import tensor_arguments

aten = torch.ops.aten


class SparseFakes:
    """Runs the operators between a sparse gradient and the step of its optimizer, in COO layout.

    Args:
        is_known: Whether a tensor has values. Those of the indices of an embedding's gradient are the batch's own, so
            that it is known how many of them differ.

    Attributes:
        notes: Sentences on what is not known.
    """

    def __init__(self, is_known: Callable[[Tensor], bool]) -> None:
        self._is_known = is_known
        self._indices = WeakTensorKeyDictionary()
        self._replaced: tuple[Tensor, Tensor] | None = None  # in place: there until what replaces it is
        self.notes: set[str] = set()

    def run(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The result of an operator that makes a sparse tensor; None where the fake kernel is right, or not known."""
        if not operator.is_view:  # the tracker looks at parts of the result first
            self._replaced = None
        if operator is aten._sparse_coo_tensor_with_dims_and_tensors.default:
            return self._note(operator(*args, **kwargs), args[3])
        if operator is aten._embedding_bag_backward.default and args[9]:  # sparse
            return self._of_bags(*args)
        if operator is aten.sparse_mask.default and _is_sparse(args[1]):
            dense, mask = args
            indices = mask._indices()
            values = dense.new_empty((mask._nnz(), *dense.shape[mask.sparse_dim() :]))
            return self._like(mask, dense.shape, torch.empty_like(indices), values, mask.is_coalesced())
        sparse = [tensor for tensor in tensor_arguments(args, kwargs) if _is_sparse(tensor)]
        if len(sparse) == 2 and operator in (aten.add.Tensor, aten.add_.Tensor):
            return self._summed(sparse[0], sparse[1], operator is aten.add_.Tensor)
        if len(sparse) != 1 or sparse[0] is not args[0]:
            return None
        return self._run_on_one(operator, sparse[0], args[1:], kwargs)

    def _run_on_one(
        self, operator: Any, sparse: Tensor, others: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        if operator is aten._coalesce.default:
            return self._coalesced(sparse)
        is_elementwise = torch.Tag.pointwise in operator.tags and not operator._schema.is_mutable
        if operator is not aten.clone.default and not is_elementwise:
            return None
        values = operator(sparse._values(), *others, **kwargs)
        return self._like(sparse, sparse.shape, sparse._indices().clone(), values, sparse.is_coalesced())

    def _of_bags(self, gradient: Tensor, ids: Tensor, *others: Any) -> Tensor:
        rows, padding = others[4], others[9] if len(others) > 9 else -1
        with unset_fake_temporarily() if self._is_known(ids) else nullcontext():
            counted = ids[ids != padding] if self._is_known(ids) else ids
            indices = counted.reshape(1, -1)
        values = gradient.new_empty((indices.shape[1], gradient.shape[1]))
        return self._note(_made((rows, gradient.shape[1]), indices, values), indices)

    def _summed(self, first: Tensor, second: Tensor, in_place: bool) -> Tensor:
        both = first._nnz() + second._nnz()
        indices, values = first._indices(), first._values()
        known = self._places_of_sum(first, second)
        kept = both if known is None else known.shape[1]
        # The kernel makes room for all, and has one element where two meet at the same place on its way.
        made = _made(
            first.shape,
            indices.new_empty((indices.shape[0], both))[:, :kept],
            values.new_empty((both, *values.shape[1:]))[:kept],
        )
        if in_place:
            self._replaced = indices, values
            first.data = made
            self._indices.pop(first, None)
            made = first
        return made if known is None else self._note(made, known)

    def _places_of_sum(self, *parts: Tensor) -> Tensor | None:
        """Of both together, by a sum of real tensors of single numbers."""
        known = [self._indices.get(part) for part in parts]
        if any(each is None for each in known):
            return None
        with unset_fake_temporarily():
            ones = [
                torch.sparse_coo_tensor(
                    each, torch.ones(each.shape[1]), part.shape[: part.sparse_dim()], is_coalesced=part.is_coalesced()
                )
                for each, part in zip(known, parts, strict=True)
            ]
            return (ones[0] + ones[1])._indices()

    def _coalesced(self, sparse: Tensor) -> Tensor:
        indices, values = sparse._indices(), sparse._values()
        known = self._indices.get(sparse)
        if known is None:
            self.notes.add(
                "how many rows a sparse gradient has could not be told, so that each of its elements is counted as "
                "one of its own"
            )
            distinct = min(sparse._nnz(), prod(sparse.shape[: sparse.sparse_dim()]))
        else:
            with unset_fake_temporarily():
                known = known.unique(dim=1)
            distinct = known.shape[1]
        # The kernel makes room for all, and takes as much of it as there are distinct ones.
        made = _made(
            sparse.shape,
            torch.empty_like(indices)[:, :distinct],
            torch.empty_like(values)[:distinct],
            is_coalesced=True,
        )
        return made if known is None else self._note(made, known)

    def _like(self, sparse: Tensor, shape: Any, indices: Tensor, values: Tensor, is_coalesced: bool) -> Tensor:
        made = _made(shape, indices, values, is_coalesced)
        known = self._indices.get(sparse)
        return made if known is None else self._note(made, known)

    def _note(self, made: Tensor, indices: Tensor) -> Tensor:
        if not isinstance(indices, FakeTensor) and self._is_known(indices):
            self._indices[made] = indices
        return made


def _is_sparse(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.layout is torch.sparse_coo


def _made(shape: Any, indices: Tensor, values: Tensor, is_coalesced: bool = False) -> Tensor:
    dense_dims = values.dim() - 1
    made: Tensor = aten._sparse_coo_tensor_with_dims_and_tensors(
        len(shape) - dense_dims, dense_dims, shape, indices, values, dtype=values.dtype, layout=torch.sparse_coo,
        device=values.device, is_coalesced=is_coalesced,
    )  # fmt: skip
    return made
