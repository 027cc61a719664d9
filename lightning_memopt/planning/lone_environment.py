"""A cluster of which only one rank exists."""

from lightning.fabric.plugins.environments import ClusterEnvironment
from typing_extensions import override


class LoneEnvironment(ClusterEnvironment):
    """Says what a launcher would say to one rank of so many on one node.

    Args:
        world_size: How many ranks there would be.
        rank: Which of them it is.
    """

    def __init__(self, world_size: int, rank: int = 0) -> None:
        super().__init__()
        self._world_size = world_size
        self._rank = rank

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return "localhost"

    @property
    @override
    def main_port(self) -> int:
        return 0

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self._world_size

    @override
    def set_world_size(self, size: int) -> None:
        pass

    @override
    def global_rank(self) -> int:
        return self._rank

    @override
    def set_global_rank(self, rank: int) -> None:
        pass

    @override
    def local_rank(self) -> int:
        return self._rank

    @override
    def node_rank(self) -> int:
        return 0
