"""Keep the values that are cheap to keep, so that a step on fake tensors can branch on its batch."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_memopt.memory.arguments import tensor_arguments, tensor_results
from lightning_memopt.models.fake import run_operator
from lightning_memopt.planning.sparse_fakes import SparseFakes

_MAX_ELEMENTS = 2**22
aten = torch.ops.aten


def stays_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor keeps its values in a fake run: token ids, labels, masks and counters do."""
    is_countable = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    is_real = not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"
    return is_countable and is_real and tensor.numel() <= _MAX_ELEMENTS


class KnownValues(TorchDispatchMode):
    """Computes for real what follows from integers and booleans alone; enter it inside the ``FakeTensorMode``.

    Models look at masks and ids: Hugging Face skips attention masks that mask nothing, a loss indexes by a mask. With
    their values known a fake step takes the branch of the real one, and tensors of data-dependent shape have one.

    A single number that a step draws uniformly from 0 to 1 decides whether a layer is dropped. It is taken for one
    just below a half, with which every layer runs that is dropped less often than not, however the question is put
    (``draw < drop`` and ``draw < keep``, a half being a usual ``keep`` of the last block): what the step takes when
    none is dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn = WeakTensorKeyDictionary()
        self._sparse = SparseFakes(stays_real)

    def notes(self) -> list[str]:
        """A sentence for each thing that was not known and had to be guessed."""
        return sorted(self._sparse.notes)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a fake run, and to make sure of it at every call takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = kwargs or {}
        tensors = tensor_arguments(args, kwargs)
        if tensors and all(map(self._is_known, tensors)):
            with unset_fake_temporarily():
                real = func(*args, **kwargs)
            if all(map(stays_real, tensor_results(real))):
                return real
        if (sparse := self._sparse.run(func, args, kwargs)) is not None:
            return sparse
        if func is aten.index.Tensor:
            args = (args[0], _without_masks(args[1]))
        result = run_operator(func, args, kwargs)
        if not tensors and isinstance(result, FakeTensor):
            if _makes_integers(func, result):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            if func is aten.rand.default and result.numel() == 1 and result.device.type == "cpu":
                with unset_fake_temporarily():
                    middle = torch.full(result.shape, 0.5 - torch.finfo(result.dtype).eps, dtype=result.dtype)
                self._drawn[middle] = True
                return middle
        return result

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return stays_real(tensor) or tensor in self._drawn


def _makes_integers(func: Any, result: torch.Tensor) -> bool:
    is_integer = not (result.dtype.is_floating_point or result.dtype.is_complex)
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    return is_integer and not is_random and result.device.type == "cpu" and result.numel() <= _MAX_ELEMENTS


def _without_masks(indices: Any) -> list[Any]:
    """The same indices with a known mask written as the positions that it selects, whose number is then known."""
    unmasked: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype is torch.bool and stays_real(index)
        if is_mask:
            with unset_fake_temporarily():
                unmasked.extend(index.nonzero(as_tuple=True))
        else:
            unmasked.append(index)
    return unmasked
