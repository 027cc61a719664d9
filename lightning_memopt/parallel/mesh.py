"""The one owner of sizes: how many ways each kind of parallelism divides the ranks, and the mesh that follows."""

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from torch.distributed import ProcessGroup, get_rank, new_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMENSIONS = ("pipeline", "data", "shard", "tensor")
"""From the outside in: the ranks of one tensor group talk most, so they are neighbours, on one host where it holds
them; pipeline stages talk least."""

REST = -1
"""As a size: whatever the other sizes leave of the world."""


@dataclass(frozen=True)
class MeshSizes:
    """How many ways each dimension divides the ranks; the product is the world size.

    Attributes:
        pipeline: Stages that a step passes through.
        data: Replicas, each with its own batches.
        shard: Ranks that share one replica's parameters, gradients and optimizer state, each with its own batches.
        tensor: Ranks that share each matrix product, with the same batches.
    """

    pipeline: int = 1
    data: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        """The number of ranks."""
        return prod(self.of(name) for name in DIMENSIONS)

    @property
    def batches(self) -> int:
        """How many different batches a step has."""
        return self.data * self.shard

    def of(self, name: str) -> int:
        """The size of the dimension ``name``."""
        size: int = getattr(self, name)
        return size

    def batch_of(self, rank: int) -> int:
        """Which of a step's batches ``rank`` has."""
        return rank // self.tensor % self.batches

    def __str__(self) -> str:
        return ", ".join(f"{name}={self.of(name)}" for name in DIMENSIONS)


def resolve_sizes(world_size: int, *, pipeline: int = 1, data: int = 1, shard: int = 1, tensor: int = 1) -> MeshSizes:
    """Fill in the one size that is ``-1`` and check that the product is the number of ranks.

    Args:
        world_size: The number of ranks.
        pipeline: As the others: at least 1, or ``-1`` (one of them at most) for the rest of the world.
        data: See :class:`MeshSizes`.
        shard: See :class:`MeshSizes`.
        tensor: See :class:`MeshSizes`.

    Raises:
        ValueError: A size that is no size, two that are ``-1``, or a product that is not ``world_size``; lists the
            products that are and are nearest to what was given.

    Example:
        >>> print(resolve_sizes(8, data=-1, tensor=2))
        pipeline=1, data=4, shard=1, tensor=2
    """
    given = {"pipeline": pipeline, "data": data, "shard": shard, "tensor": tensor}
    for name, size in given.items():
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != REST):
            raise ValueError(
                f"{name}={size!r} is no number of ranks; give 1 or more, or -1 for the rest of the world."
            )
    open_names = [name for name, size in given.items() if size == REST]
    if len(open_names) > 1:
        raise ValueError(
            f"{' and '.join(f'{name}=-1' for name in open_names)}: only one size can be the rest of the world."
        )
    known = prod(size for size in given.values() if size != REST)
    shown = ", ".join(f"{name}={size}" for name, size in given.items())
    if world_size % known or (not open_names and known != world_size):
        raise ValueError(
            f"{shown} makes {known}{' times the rest' if open_names else ''}, and there are {world_size} ranks. "
            f"With {world_size} ranks possible are, for example: {'; '.join(map(str, _nearest(world_size, given)))}."
        )
    return MeshSizes(**{name: world_size // known if size == REST else size for name, size in given.items()})


def _nearest(world_size: int, given: dict[str, int], most: int = 4) -> list[MeshSizes]:
    """Products that are the world size and change the fewest of the given sizes, by the least."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    choices = [divisors if given[name] != 1 else [1] for name in DIMENSIONS]
    if all(choice == [1] for choice in choices):
        choices[DIMENSIONS.index("data")] = divisors

    def changes(sizes: tuple[int, ...]) -> tuple[int, int]:
        differences = [
            abs(size - given[name]) for name, size in zip(DIMENSIONS, sizes, strict=True) if given[name] != REST
        ]
        return sum(map(bool, differences)), sum(differences)

    fitting = sorted((sizes for sizes in product(*choices) if prod(sizes) == world_size), key=changes)
    return [MeshSizes(*sizes) for sizes in fitting[:most]]


class ParallelMesh:
    """The device mesh of some sizes, and the parts of it that each kind of parallelism asks for.

    All ranks have to make it together, since it makes process groups.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        sizes: The size of each dimension.

    Example:
        >>> mesh = ParallelMesh("cpu", resolve_sizes(4, data=2, tensor=2))  # doctest: +SKIP
    """

    def __init__(self, device_type: str, sizes: MeshSizes) -> None:
        self.sizes = sizes
        # Only what divides: each dimension is a process group, with threads and connections of its own, but for one
        # that holds all ranks by itself. FSDP2 asks replicas for the shards of each, if only one.
        names = [name for name in DIMENSIONS if sizes.of(name) > 1 or (name == "shard" and sizes.data > 1)]
        self.whole: DeviceMesh = init_device_mesh(
            device_type, tuple(map(sizes.of, names)) or (1,), mesh_dim_names=tuple(names) or ("shard",)
        )
        # Made by all ranks together, so not when a rank first asks for it.
        self.batch_group: ProcessGroup = self._make_batch_group()
        """The ranks that together have each of a step's batches once: what a mean over the batch is taken over."""

    @property
    def tensor(self) -> DeviceMesh:
        """This rank's tensor group."""
        return self.whole["tensor"]

    @property
    def pipeline(self) -> DeviceMesh:
        """The stages that this rank's batches pass through."""
        return self.whole["pipeline"]

    @property
    def pipelines(self) -> list[list[int]]:
        """The global ranks of each pipeline of the world, from the first stage on."""
        apart = self.sizes.world // self.sizes.pipeline  # it is the outermost of the dimensions
        return [list(range(first, self.sizes.world, apart)) for first in range(apart)]

    @cached_property
    def shards(self) -> DeviceMesh:
        """What FSDP2 shards over: one dimension, or two, of which the first replicates."""
        return self.whole["shard"] if self.sizes.data == 1 else self.whole["data", "shard"]

    def _make_batch_group(self) -> ProcessGroup:
        if self.sizes.batches == 1 < self.sizes.world:
            return new_group([get_rank()], use_local_synchronization=True)
        shards = self.shards
        return (shards if shards.ndim == 1 else shards._flatten("batches")).get_group()
