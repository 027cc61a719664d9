"""Let the elements of each weight share a few values: an index for each, and a short list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_memopt.compression.bits import pack_bits, unpack_bits
from lightning_memopt.compression.codecs import LARGEST_CODEBOOK
from lightning_memopt.compression.finite import check_materialized, why_not_finite
from lightning_memopt.compression.held import Held
from lightning_memopt.compression.selection import Weight, is_compressed, select_weights

Init = Literal["kmeans++", "density", "linear", "random"]

ITERATIONS = 100
"""Of k-means, at most; it ends when nothing moves."""

_SEEDING_SAMPLE = 2**16
"""Elements that first centroids are drawn from, evenly spaced among the sorted ones."""


def cluster_weights(
    module: nn.Module,
    n: int,
    init: Init = "kmeans++",
    *,
    include: Any = None,
    exclude: Any = None,
    embeddings: bool = False,
    seed: int = 0,
) -> "Clusters":
    """Round the elements of every weight of ``module`` to ``n`` values of its own, by k-means.

    Args:
        module: Any module; its parameters stay the same objects.
        n: Values, 2 to 256. 16 are 4 bits an element, and 32 are 5.
        init: First centroids: ``"kmeans++"`` (Arthur and Vassilvitskii 2007), ``"density"`` (quantiles),
            ``"linear"`` (evenly spaced), ``"random"`` (elements).
        include: See :func:`~lightning_memopt.compression.selection.select_weights`.
        exclude: Likewise.
        embeddings: Likewise.
        seed: Of what is drawn.

    Returns:
        The clusters. To go on training with them, :meth:`Clusters.hold` the optimizers to them.

    Raises:
        ValueError: ``n`` or ``init`` is out of range, no weight matches, or one is not finite; nothing has changed.

    Example:
        >>> net = nn.Linear(32, 32)
        >>> _ = cluster_weights(net, 16)
        >>> len(net.weight.unique()) <= 16
        True
    """
    check_clusters(n, init)
    clusters = Clusters(select_weights(module, include, exclude, embeddings=embeddings).weights)
    clusters.find(n, init, seed)
    return clusters


def check_clusters(n: Any, init: Any) -> None:
    """Raise a :class:`ValueError` where ``n`` is no number of clusters, or ``init`` no way to begin."""
    if isinstance(n, bool) or not isinstance(n, int) or not 2 <= n <= LARGEST_CODEBOOK:
        raise ValueError(
            f"n={n!r} is no number of clusters that saves bytes; give 2 to {LARGEST_CODEBOOK}, such as 16."
        )
    if init not in get_args(Init):
        raise ValueError(f"init={init!r} is none of {', '.join(map(repr, get_args(Init)))}.")


class Clusters(Held):
    """Which elements of some weights share a value; at first none.

    Args:
        weights: The weights, whole on this rank.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._members: dict[str, _Members] = {}

    @property
    @override
    def found(self) -> bool:
        """Whether there are clusters."""
        return bool(self._members)

    @torch.no_grad()
    def find(self, n: int, init: Init = "kmeans++", seed: int = 0, *, all_zeros: bool = False) -> None:
        """Find ``n`` clusters in each weight, and round its elements to them.

        Where at least one element in ``n`` is zero (a pruned weight), zero is a value of its own and stays so.

        Args:
            n: See :func:`cluster_weights`.
            init: See there.
            seed: See there.
            all_zeros: Keep zeros however few there are, as where something prunes to fewer.

        Raises:
            ValueError: A weight has NaN or infinite elements, of which there is no mean, or none yet (meta device).
        """
        check_materialized((weight.name, weight.parameter) for weight in self.weights.values())
        for weight in self.weights.values():
            if reason := why_not_finite(weight.parameter):
                raise ValueError(
                    f"{weight.name!r} {reason}, and has no clusters. Cluster the weights of a checkpoint from "
                    f"before, or leave it out with exclude={weight.name!r}."
                )
        for name, weight in self.weights.items():
            values = weight.parameter.detach().float()
            is_zero = values == 0
            keeps_zero = bool(is_zero.any() if all_zeros else is_zero.sum() * n >= values.numel())
            generator = torch.Generator().manual_seed(crc32(name.encode()) + seed)
            rest = values[~is_zero] if keeps_zero else values.view(-1)
            if not len(rest):
                continue
            centroids = find_centroids(rest, n - keeps_zero, init, generator)
            indices = torch.bucketize(values, (centroids[1:] + centroids[:-1]) / 2) + int(keeps_zero)
            if keeps_zero:
                indices[is_zero] = 0
            bits = (n - 1).bit_length()
            self._members[name] = _Members(pack_bits(indices, bits), n, keeps_zero)
        self.apply()

    @override
    @torch.no_grad()
    def apply(self) -> None:
        """Set each element to the mean of its cluster.

        After an optimizer's step this moves each value by the mean update of its elements: with plain SGD, that of a
        shared value whose gradient is the mean of theirs.
        """
        for name, members in self._members.items():
            _share(self.weights[name].parameter, members)

    @override
    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Of each weight, by name, the packed numbers of its elements' clusters."""
        return {
            name: {"indices": members.indices.cpu(), "n": members.n, "keeps_zero": members.keeps_zero}
            for name, members in self._members.items()
        }

    @override
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the clusters; the weights do not change.

        Raises:
            ValueError: There are clusters of a weight that is not here.
        """
        for name in state.keys() - self.weights.keys():
            raise ValueError(
                f"There are clusters of {name!r}, which is not among the weights to cluster. Resume with the module "
                "and the include, exclude and embeddings that they were saved with."
            )
        self._members = {
            name: _Members(entry["indices"].to(self.weights[name].parameter.device), entry["n"], entry["keeps_zero"])
            for name, entry in state.items()
        }


@torch.no_grad()
def apply_clusters(module: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Let elements share values as in :meth:`Clusters.state_dict`, of parameters that are still there and plain."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, entry in state.items():
        if name in parameters and not is_compressed(parameters[name]):
            _share(parameters[name], _Members(entry["indices"], entry["n"], entry["keeps_zero"]))


def find_centroids(values: Tensor, n: int, init: Init, generator: torch.Generator) -> Tensor:
    """K-means in one dimension.

    Sorted, a cluster is a range, and its mean a difference of two running sums: an iteration takes time with ``n``,
    not with the number of values.

    Args:
        values: Float, one-dimensional, not empty.
        n: Clusters.
        init: See :func:`cluster_weights`.
        generator: On the CPU.

    Returns:
        At most ``n`` centroids, ascending.
    """
    ordered = values.sort().values
    sums = torch.cat([ordered.new_zeros(1, dtype=torch.float64), ordered.double().cumsum(0)])
    centroids = _first_centroids(ordered, n, init, generator)
    for _ in range(ITERATIONS):
        ends = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        counts = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / counts
        moved = torch.where(counts > 0, means.float(), centroids).sort().values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _first_centroids(ordered: Tensor, n: int, init: Init, generator: torch.Generator) -> Tensor:
    if init == "linear":
        return torch.linspace(float(ordered[0]), float(ordered[-1]), n, device=ordered.device)
    if init == "density":
        places = (torch.arange(n, device=ordered.device) + 0.5) * len(ordered) / n
        return ordered[places.long()]
    sample = ordered[:: max(1, len(ordered) // _SEEDING_SAMPLE)]
    if init == "random":
        return sample[torch.randperm(len(sample), generator=generator)[:n].to(sample.device)].sort().values
    chosen = [sample[int(torch.randint(len(sample), (1,), generator=generator))]]
    distances = (sample - chosen[0]).square()
    while len(chosen) < n and distances.any():  # fewer where there are fewer values than clusters
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(sample.device)
        running = distances.double().cumsum(0)
        chosen.append(
            sample[int(torch.searchsorted(running, draw * running[-1], right=True).clamp(max=len(sample) - 1))]
        )
        distances = torch.minimum(distances, (sample - chosen[-1]).square())
    return torch.stack(chosen).sort().values


@dataclass(frozen=True)
class _Members:
    """The packed cluster numbers of a weight's elements, of ``n``; number 0 is zero itself where ``keeps_zero``."""

    indices: Tensor
    n: int
    keeps_zero: bool


def _share(parameter: Tensor, members: _Members) -> None:
    bits = (members.n - 1).bit_length()
    indices = unpack_bits(members.indices.to(parameter.device), bits, parameter.numel()).long()
    values = parameter.detach().reshape(-1)
    sums = torch.bincount(indices, weights=values.double(), minlength=members.n)
    means = sums / torch.bincount(indices, minlength=members.n).clamp(min=1)
    if members.keeps_zero:
        means[0] = 0
    parameter.detach().copy_(means.to(parameter.dtype)[indices].view(parameter.shape))
