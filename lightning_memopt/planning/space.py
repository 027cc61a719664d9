"""What a plan may switch on for one device, and in which order it costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log2
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback

from lightning_memopt.parallel.mesh import DIMENSIONS, MeshSizes
from lightning_memopt.registration import STRATEGIES, make_strategy

Checkpointing = Literal["none", "selective", "budget", "full"]
_LEVELS: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""Of those, what every search looks at; a budget refines what it found."""


@dataclass(frozen=True)
class Techniques:
    """What is switched on beside what the user's trainer has.

    Attributes:
        checkpointing: Policy of ``ActivationCheckpointing``.
        kept: The fraction of the activations that the policy ``"budget"`` keeps; ``None`` with another.
        micro_batch: Samples in a micro-batch of ``MicroBatching``; ``None`` leaves batches whole.
        chunked_loss: ``ChunkedLoss``.
        in_backward: ``OptimizerInBackward``.
        offload: ``ActivationOffload``.
        low_bit: ``LowBitOptimizer(8)``; changes the numbers.
        precision: ``Trainer(precision=...)``; one that is not the user's changes the numbers.
    """

    checkpointing: Checkpointing = "none"
    micro_batch: int | None = None
    chunked_loss: bool = False
    in_backward: bool = False
    offload: bool = False
    low_bit: bool = False
    precision: str = "32-true"
    kept: float | None = None

    def callbacks(self, device_kind: str) -> list[Callback]:
        """New callbacks that do it, on a device of this kind."""
        import lightning_memopt as memopt

        callbacks: list[Callback] = []
        if self.checkpointing != "none":
            callbacks.append(memopt.ActivationCheckpointing(self.checkpointing, budget=self.kept))
        if self.chunked_loss:
            callbacks.append(memopt.ChunkedLoss())
        if self.offload:
            callbacks.append(memopt.ActivationOffload("cpu" if device_kind == "cuda" else "disk"))
        if self.micro_batch is not None:
            callbacks.append(memopt.MicroBatching(self.micro_batch))
        if self.in_backward:
            callbacks.append(memopt.OptimizerInBackward())
        if self.low_bit:
            callbacks.append(memopt.LowBitOptimizer(8))
        return callbacks

    def written(self, device_kind: str) -> list[tuple[str, dict[str, Any]]]:
        """The same callbacks as class names of the package and their arguments, to be printed."""
        place = "cpu" if device_kind == "cuda" else "disk"
        budget = {} if self.kept is None else {"budget": self.kept}
        rows: list[tuple[bool, str, dict[str, Any]]] = [
            (self.checkpointing != "none", "ActivationCheckpointing", {"policy": self.checkpointing, **budget}),
            (self.chunked_loss, "ChunkedLoss", {}),
            (self.offload, "ActivationOffload", {"to": place}),
            (self.micro_batch is not None, "MicroBatching", {"size": self.micro_batch}),
            (self.in_backward, "OptimizerInBackward", {}),
            (self.low_bit, "LowBitOptimizer", {"bits": 8}),
        ]
        return [(name, arguments) for is_on, name, arguments in rows if is_on]

    def names(self, plain: "Techniques") -> dict[str, str]:
        """By attribute what this has beside ``plain``, in words."""
        kept = f"checkpointing that keeps {self.kept:.0%} of the activations" if self.kept is not None else ""
        words = {
            "checkpointing": kept or f"{self.checkpointing} checkpointing",
            "chunked_loss": "chunked loss",
            "offload": "activation offload",
            "micro_batch": f"micro-batches of {self.micro_batch}",
            "in_backward": "optimizer in the backward",
            "low_bit": "8-bit optimizer state",
            "precision": self.precision,
        }
        changed = {name for name in words if getattr(self, name) != getattr(plain, name)}
        if self.kept != plain.kept:
            changed.add("checkpointing")
        return {name: word for name, word in words.items() if name in changed}

    def needs_no_more_than(self, other: "Techniques") -> bool:
        """Whether each of ``other``'s savings is here too, or a stronger one."""
        here, there = self.micro_batch, other.micro_batch
        return (
            self._keeps_no_more_than(other)
            and (there is None or (here is not None and here <= there))
            and self.chunked_loss >= other.chunked_loss
            and self.in_backward >= other.in_backward
            and self.offload >= other.offload
            and self.low_bit >= other.low_bit
            and self.precision == other.precision
        )

    def _keeps_no_more_than(self, other: "Techniques") -> bool:
        if self.checkpointing == "full" or other.checkpointing == "none":
            return True
        if self.kept is not None and other.kept is not None:
            return self.kept <= other.kept
        return self.checkpointing == other.checkpointing

    def usual_slowdown(self, batch_size: int) -> float:
        """What such a step usually takes, as a multiple of the plain one: the order in which plans are looked at."""
        halvings = (batch_size / self.micro_batch) if self.micro_batch else 1.0
        return (
            {"none": 1.0, "selective": 1.1, "budget": 1.2, "full": 1.33}[self.checkpointing]
            * (1 + 0.02 * (halvings - 1))
            * (1.02 if self.chunked_loss else 1.0)
            * (1.01 if self.in_backward else 1.0)
            * (1.4 if self.offload else 1.0)
            * (1.05 if self.low_bit else 1.0)
        )


ONE = MeshSizes()
"""One device."""

_USUAL_SLOWDOWN = {
    "auto": 1.0,
    "memopt_ddp": 1.02,
    "memopt_zero1": 1.04,
    "memopt_zero2": 1.05,
    "memopt_zero3": 1.08,
    "memopt_hybrid": 1.08,
    "memopt_tp": 1.2,
    "memopt_pp": 1.0,
    "memopt_zero3_offload": 1.5,
}
"""The order in which layouts are looked at; their times follow from their traces."""


@dataclass(frozen=True)
class Layout:
    """How a step is spread over devices.

    Attributes:
        strategy: ``Trainer(strategy=...)``; ``"auto"`` on one device.
        sizes: How many ways each kind of parallelism divides the ranks.
    """

    strategy: str = "auto"
    sizes: MeshSizes = ONE

    def __str__(self) -> str:
        sizes = [f"{name}={self.sizes.of(name)}" for name in DIMENSIONS if self.sizes.of(name) > 1]
        return " ".join([self.strategy, *sizes])

    @property
    def offloads(self) -> bool:
        """Whether shards, their gradients and the optimizer's state are in the host's memory."""
        return self.strategy.endswith("_offload")

    def takes(self, techniques: Techniques) -> bool:
        """Whether what steps optimizers otherwise is possible here, and one kind of offload at a time."""
        return (
            (not techniques.in_backward or self.strategy == "auto")
            and not (techniques.offload and self.offloads)
            and (techniques.micro_batch is None or self.sizes.pipeline == 1)  # it splits batches itself
        )

    @property
    def gathers_all(self) -> bool:
        """Whether all parameters are whole at once, though they are kept in shards."""
        return self.strategy in ("memopt_zero1", "memopt_zero2")

    @property
    def usual_slowdown(self) -> float:
        """What such a step usually takes, as a multiple of what its share of one device's would."""
        waits = 1.25 if self.sizes.pipeline > 1 else 1.0  # four micro-batches a stage
        return _USUAL_SLOWDOWN[self.strategy] * (1 + 0.1 * log2(self.sizes.tensor)) * waits

    def make_strategy(self, **options: Any) -> Any:
        """A strategy object that does it; ``options`` are Lightning's."""
        if self.strategy == "memopt_hybrid":
            from lightning_memopt import HybridStrategy

            return HybridStrategy(**{name: self.sizes.of(name) for name in DIMENSIONS}, **options)
        path, own = STRATEGIES[self.strategy]
        return make_strategy(path, **own, **options)


@dataclass(frozen=True)
class Choice:
    """One point of the space: where a step runs and what is switched on there."""

    layout: Layout
    techniques: Techniques

    def needs_no_more_than(self, other: "Choice") -> bool:
        """Whether each of ``other``'s savings is here too, on the same layout."""
        return self.layout == other.layout and self.techniques.needs_no_more_than(other.techniques)

    def has_refused(self, reason: str) -> bool:
        """Whether the callback whose refusal begins with its name is part of this."""
        return any(reason.startswith(name) for name, _ in self.techniques.written("cpu"))

    def usual_slowdown(self, batch_size: int) -> float:
        """Of its layout and its techniques together."""
        return self.layout.usual_slowdown * self.techniques.usual_slowdown(batch_size)

    def adds_to(self, other: "Choice") -> bool:
        """Whether this is ``other`` with more switched on."""
        return self != other and self.needs_no_more_than(other)


@dataclass(frozen=True)
class Space:
    """What can be switched on for a module and a batch.

    Attributes:
        plain: What is on in any case: the user's precision, and what costs nothing.
        micro_batches: Sizes that divide the work of a batch, the largest first; empty where batches stay whole.
        chunked_loss: Whether the module has a loss to chunk.
        in_backward: Whether its optimizer may step in the backward.
        accumulates: Whether the user's trainer accumulates gradients.
    """

    plain: Techniques
    micro_batches: tuple[int, ...]
    chunked_loss: bool
    in_backward: bool
    accumulates: bool = False

    def tiers(self, layouts: Sequence[Layout], exact: bool) -> Iterator[list[Choice]]:
        """The choices, in groups of which a later is wanted only where nothing of an earlier fits.

        First what changes neither the numbers nor where anything is, then offload, then, unless ``exact``, what
        changes the numbers.
        """
        unchanged = self._exact()
        offloaded = [replace(each, offload=True) for each in unchanged if each.checkpointing != "selective"]
        staying = [layout for layout in layouts if not layout.offloads]
        offloading = [layout for layout in layouts if layout.offloads]
        yield self._product(staying, unchanged)
        yield self._product(staying, offloaded) + self._product(offloading, unchanged)
        if not exact:
            yield self._product(layouts, [replace(each, low_bit=True) for each in (*unchanged, *offloaded)])
        if not exact and self.plain.precision == "32-true":
            half = [replace(each, precision="bf16-mixed") for each in (*unchanged, *offloaded)]
            yield self._product(layouts, half + [replace(each, low_bit=True) for each in half])

    def _product(self, layouts: Sequence[Layout], techniques: Sequence[Techniques]) -> list[Choice]:
        return [
            Choice(layout, each)
            for layout in layouts
            for each in techniques
            # ZeRO 1 and 2 differ only while gradients add up: with one backward a step they are one and the same.
            if layout.takes(each)
            and (layout.strategy != "memopt_zero1" or self.accumulates or each.micro_batch is not None)
        ]

    def _exact(self) -> list[Techniques]:
        switches = product(
            _LEVELS,
            (None, *self.micro_batches),
            sorted({self.plain.chunked_loss, self.chunked_loss}),
            (False, True) if self.in_backward else (False,),
        )
        return [
            replace(self.plain, checkpointing=level, micro_batch=size, chunked_loss=chunked, in_backward=in_backward)
            for level, size, chunked, in_backward in switches
            if size is None or not in_backward  # micro-batches add up the gradients that the other frees
        ]


def find_layouts(devices: int, nodes: int, *, has_host: bool, most_stages: int = 1) -> list[Layout]:
    """The ways to spread a step over ``devices`` on each of ``nodes`` that the planner looks at.

    Tensor parallelism stays within a node. Ranks that a pipeline leaves share the parameters of their stage; across
    nodes, those of a node may instead share its matrix products.

    Args:
        devices: Devices of a node.
        nodes: Nodes.
        has_host: Whether there is another memory than the devices' to offload to.
        most_stages: Into how many stages of a pipeline the module and the batch can be cut; 1 for not at all.
    """
    world = devices * nodes
    if world == 1:
        return [Layout()]
    layouts = [Layout("memopt_ddp", MeshSizes(data=world))]
    layouts += [Layout(f"memopt_zero{stage}", MeshSizes(shard=world)) for stage in (1, 2, 3)]
    if nodes > 1 and devices > 1:
        layouts.append(Layout("memopt_hybrid", MeshSizes(data=nodes, shard=devices)))
    widest = widest_tensor(devices)
    tensor = 2
    while tensor <= widest:
        if tensor == world:
            layouts.append(Layout("memopt_tp", MeshSizes(tensor=tensor)))
        else:
            layouts.append(Layout("memopt_hybrid", MeshSizes(shard=world // tensor, tensor=tensor)))
        tensor *= 2
    stages = 2
    while stages <= min(world, most_stages) and world % stages == 0:
        if stages == world:
            layouts.append(Layout("memopt_pp", MeshSizes(pipeline=stages)))
        else:
            layouts.append(Layout("memopt_hybrid", MeshSizes(pipeline=stages, shard=world // stages)))
        if 1 < widest < world and stages <= nodes and world % (stages * widest) == 0:
            rest = world // stages // widest
            layouts.append(Layout("memopt_hybrid", MeshSizes(pipeline=stages, shard=rest, tensor=widest)))
        stages *= 2
    if has_host:
        layouts.append(Layout("memopt_zero3_offload", MeshSizes(shard=world)))
    return layouts


def widest_tensor(devices: int) -> int:
    """Over how many devices of a node the planner splits matrix products at most: ``widest_tensor(12) == 4``.

    Powers of two, since attention has such numbers of heads.
    """
    return devices & -devices


def halvings(batch_size: int) -> tuple[int, ...]:
    """``halvings(12) == (6, 3, 2, 1)``: sizes of micro-batches, each about half of the one before."""
    sizes = []
    while batch_size > 1:
        batch_size = (batch_size + 1) // 2
        sizes.append(batch_size)
    return tuple(sizes)
