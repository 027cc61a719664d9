"""Masks over weights: one bit an element, beside the module and not in it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_memopt.compression.bits import INTEGERS, pack_bits, packed_bytes, unpack_bits
from lightning_memopt.compression.choose import Choice, choose_pruned, read_whole
from lightning_memopt.compression.held import Held
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.selection import Weight, WeightFilter, find_weights, is_compressed
from lightning_memopt.parallel.shards import shards_of_whole

PIECE = 2**18
"""Elements whose mask is unpacked at a time (a multiple of 8): few enough for a processor's cache."""


def prune_weights(
    module: nn.Module,
    amount: float,
    *,
    include: Any = None,
    exclude: Any = None,
    embeddings: bool = False,
    **how: Any,
) -> "Masks":
    """Set a share ``amount`` of the weights of ``module`` to zero.

    Args:
        module: Any module; its parameters stay the same objects.
        amount: Share of zeros that the weights have afterwards (zeros that are there already count).
        include: See :func:`~lightning_memopt.compression.selection.select_weights`.
        exclude: Likewise.
        embeddings: Likewise.
        **how: ``method``, ``pattern``, ``scope`` and ``seed``: see
            :class:`~lightning_memopt.compression.choose.Choice`.

    Returns:
        The masks. To go on training with them, :meth:`Masks.hold` the optimizers to them.

    Raises:
        ValueError: ``amount`` is not between 0 and 1, an argument is unknown, or the weights cannot be pruned so.
            Those that a pattern does not divide, such as first convolutions of three channels, are left
            (:attr:`Masks.skipped`), unless ``include`` asks for them.

    Example:
        >>> net = nn.Linear(8, 4)
        >>> prune_weights(net, 0.5, pattern="2:4").sparsity
        0.5
    """
    choice = Choice(**how)
    selection = choice.select(module, WeightFilter(include, exclude, embeddings), amount)
    masks = Masks(selection.weights)
    masks.skipped = selection.skipped
    masks.prune(amount, choice)
    masks.apply()
    return masks


def find_sparsity(module: nn.Module) -> dict[str, float]:
    """The share of zeros of each weight that has any, by name: what is pruned, whoever did it.

    Args:
        module: A model of any kind; pruned by hand, by this package or by ``torch.nn.utils.prune``, whose masks count
            before they are removed too.

    Returns:
        From the weights' qualified names to fractions in (0, 1]; weights without zeros are left out.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
        >>> find_sparsity(layer)
        {'weight': 0.5}
    """
    return {name: zeros / count for name, zeros, count in _count_zeros(module) if zeros}


def share_of_zeros(module: nn.Module, names: Collection[str]) -> float:
    """The share of zeros over the weights of ``module`` of these names, whoever made them; 0 where none is there."""
    counts = [(zeros, count) for name, zeros, count in _count_zeros(module) if name in names]
    return sum(zeros for zeros, _ in counts) / max(1, sum(count for _, count in counts))


def _count_zeros(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Of each weight its name, how many of its elements are zero, and how many there are."""
    for weight in find_weights(module):
        parameter = weight.parameter
        if is_lazy(parameter) or parameter.is_meta:
            continue  # no numbers yet
        if is_compressed(parameter) and not isinstance(parameter, PackedWeight):
            continue  # another library's
        values = read_whole(parameter)
        yield weight.name, values.numel() - int(values.count_nonzero()), values.numel()
    for name, masked in _masked_by_torch(module):
        yield name, masked.numel() - int(masked.count_nonzero()), masked.numel()


def _masked_by_torch(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What ``torch.nn.utils.prune`` makes of matrices before each run, by the names that it took them from."""
    for path, child in module.named_modules():
        for name, original in child._parameters.items():
            key = name.removesuffix("_orig")
            mask = child._buffers.get(f"{key}_mask")
            if key != name and mask is not None and original is not None and original.ndim > 1:
                yield f"{path}.{key}".lstrip("."), original.detach() * mask


@torch.no_grad()
def apply_masks(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set to zero what the masks of :meth:`Masks.state_dict` prune, of parameters that are still there and plain."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, packed in state.items():
        if name in parameters and not is_compressed(parameters[name]):
            _clear(parameters[name], packed.to(parameters[name].device))


class Masks(Held):
    """Which elements of some weights are pruned; at first none.

    Args:
        weights: The weights, from :func:`~lightning_memopt.compression.selection.select_weights`. They may be
            sharded: each rank then holds the mask of the whole, and that of its shard.

    Attributes:
        skipped: Of other parameters, why :func:`prune_weights` left them.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self.skipped: Mapping[str, str] = {}
        self._packed: dict[str, Tensor] = {}
        self._local: dict[str, Tensor] = {}

    @property
    @override
    def found(self) -> bool:
        """Whether there are masks."""
        return bool(self._packed)

    @property
    def sparsity(self) -> float:
        """Share of all elements that the masks prune; others may be zero too (:func:`share_of_zeros`)."""
        pruned = sum(int(unpack_bits(packed, 1, 8 * len(packed)).sum()) for packed in self._packed.values())
        return pruned / sum(weight.parameter.numel() for weight in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the masks take."""
        tensors = {id(mask): mask for masks in (self._packed, self._local) for mask in masks.values()}
        return sum(mask.nbytes for mask in tensors.values())

    def of(self, name: str) -> Tensor:
        """What is pruned of the weight ``name``: bool, of its shape."""
        shape = self.weights[name].parameter.shape
        if name not in self._packed:
            return torch.zeros(shape, dtype=torch.bool)
        return unpack_bits(self._packed[name], 1, shape.numel()).bool().view(shape)

    def prune(self, sparsity: float, choice: Choice) -> None:
        """Prune on until a share ``sparsity`` is; what is pruned stays so. The weights do not change yet."""
        weights = list(self.weights.values())
        for weight, pruned in choose_pruned(weights, sparsity, choice, lambda weight: self.of(weight.name)):
            # Also where it is more than ``sparsity``, as after resuming with a lower one.
            self._set(weight, pruned | self.of(weight.name).to(pruned.device))

    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """Prune by masks of your own, on top of what is pruned.

        Args:
            masks: By the name of the weight, what to keep: true (or not zero) where the weight stays.

        Raises:
            ValueError: A name or a shape is not that of a weight.
        """
        for name, kept in masks.items():
            if name not in self.weights or kept.shape != self.weights[name].parameter.shape:
                shape = tuple(self.weights[name].parameter.shape) if name in self.weights else "no weight to prune"
                raise ValueError(
                    f"The mask of {name!r} has shape {tuple(kept.shape)}, and the weight is {shape}. The weights are "
                    f"{', '.join(self.weights)}."
                )
            pruned = ~kept.detach().bool()
            self._set(self.weights[name], self.of(name).to(pruned.device) | pruned)

    @override
    @torch.no_grad()
    def apply(self) -> None:
        """Set what is pruned to zero."""
        for name, packed in self._local.items():
            _clear(self.weights[name].parameter, packed)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of what is pruned to zero: they count in no norm and in no moment of the optimizer."""
        for name, packed in self._local.items():
            gradient = self.weights[name].parameter.grad
            if gradient is not None and not gradient.is_sparse:
                _clear(gradient, packed)

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """The packed masks by name: of whole weights, whoever holds which shard."""
        return {name: packed.cpu() for name, packed in self._packed.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the masks.

        Raises:
            ValueError: A mask is of a weight that is not here, or of another size.
        """
        for name, packed in state.items():
            weight = self.weights.get(name)
            if weight is None or packed.shape != (packed_bytes(weight.parameter.numel(), 1),):
                raise ValueError(
                    f"There is a mask of {len(packed)} bytes for {name!r}, which "
                    + ("is not among the weights to prune" if weight is None else "has another size")
                    + ". Resume with the module and the include, exclude and embeddings that it was saved with."
                )
        self._packed, self._local = {}, {}
        for name, packed in state.items():
            weight = self.weights[name]
            shape = weight.parameter.shape
            self._set(weight, unpack_bits(packed, 1, shape.numel()).bool().view(shape))

    def _set(self, weight: Weight, pruned: Tensor) -> None:
        parameter = weight.parameter
        self._packed[weight.name] = self._local[weight.name] = pack_bits(pruned.to(parameter.device), 1)
        if isinstance(parameter, DTensor):
            whole = pruned.to(parameter.device_mesh.device_type)
            shard = shards_of_whole(whole, parameter.device_mesh, parameter.placements).to_local()
            self._local[weight.name] = pack_bits(shard.to(parameter.device), 1)


def _clear(tensor: Tensor, packed: Tensor) -> None:
    """Zero the elements of ``tensor``, of a shard what it has, whose bit is set; +0.0, not the -0.0 of a product."""
    values = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    bits = values.view(INTEGERS[values.element_size()])
    if not bits.is_contiguous():
        bits.bitwise_and_(_kept(packed, bits.numel(), bits.dtype).view(bits.shape))
        return
    flat = bits.view(-1)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE]
        piece.bitwise_and_(_kept(packed[start // 8 : (start + len(piece) + 7) // 8], len(piece), piece.dtype))


def _kept(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """All bits set for what is kept, none for what is pruned: an "and" is several times faster than a masked fill."""
    return unpack_bits(packed, 1, count).view(torch.int8).sub_(1).to(dtype)
