"""What steps a parameter whose state is packed: the user's optimizer piece by piece, or a kernel of a library.

All engines keep state as :class:`~lightning_memopt.techniques.blockwise.PackedTensor`, in formats that the kernels
read and write in place. So checkpoints, shards and conversions from one engine to another need not know of them.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.techniques.blockwise import BlockwiseCodec, FormatName, PackedTensor, as_packed
from lightning_memopt.techniques.per_parameter import step_alone

Bits = Literal[8, 4, "fp8"]
EngineName = Literal["memopt", "bitsandbytes", "torchao"]

FORMATS: dict[EngineName, dict[Bits, FormatName]] = {
    "memopt": {8: "8-bit", 4: "4-bit", "fp8": "fp8"},
    "bitsandbytes": {8: "8-bit with zero"},
    "torchao": {8: "8-bit with zero", 4: "4-bit", "fp8": "float8"},
}

SIGNED = {"exp_avg": True, "exp_avg_sq": False, "momentum_buffer": True}
"""The state that is packed, and whether it can be negative."""

SMALLEST = 4096
"""Tensors with fewer elements stay as they are: they are norms and biases, sensitive, and too small to matter."""

PIECE = {"cpu": 2**16, "other": 2**22}
"""Elements that are unpacked, stepped and packed at a time, by device type.

Bounds the temporaries to some 30 bytes each: 2 MiB on a CPU, where pieces that fit its cache are also the fastest,
and 120 MiB on a GPU, where each piece costs the launch of some sixty kernels.
"""


def check_engine(name: Any, bits: Any) -> None:
    """Raise a :class:`ValueError` where there is no engine of this ``name``, or it holds no state in ``bits``."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"engine={name!r} is unknown; possible are {', '.join(map(repr, FORMATS))}.")
    *others, last = map(repr, FORMATS[name])
    possible = f"{', '.join(others)} and {last}" if others else last
    if isinstance(bits, bool) or not isinstance(bits, int | str) or bits not in FORMATS[name]:
        raise ValueError(
            f"bits={bits!r} is no width that engine={name!r} can hold optimizer state in; possible are {possible}."
        )


class Engine(ABC):
    """Steps parameters whose state is packed.

    Attributes:
        name: As the user writes it.
        codec: Of the format in which its state is.
    """

    name: EngineName

    def __init__(self, bits: Bits) -> None:
        self.codec = BlockwiseCodec(FORMATS[self.name][bits])

    def packs(self, parameter: torch.Tensor) -> bool:
        """Whether the state of ``parameter`` is packed; where not, its optimizer steps it as always."""
        return parameter.numel() >= SMALLEST

    def find_problem(self, optimizer: Optimizer) -> str | None:
        """What ``optimizer`` is to do and this engine cannot, as a sentence, or ``None``."""
        return None

    def why_not(self, parameter: torch.Tensor) -> str | None:
        """Why it cannot step ``parameter``, as a sentence without its subject, or ``None``."""
        return None

    def try_out(self, optimizer: Optimizer) -> str | None:
        """Why a step fails on the device of the parameters, as a sentence, or ``None``."""
        return None

    @abstractmethod
    def step(
        self,
        optimizer: Optimizer,
        values: torch.Tensor,
        gradients: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> dict[str, Any]:
        """Step ``values`` in place.

        Args:
            optimizer: The user's.
            values: What this rank holds of a parameter, 1-d.
            gradients: Likewise.
            state: What is remembered of the parameter; empty before its first step.
            group: The hyper-parameters.

        Returns:
            What is remembered now.
        """

    def packed_or_zeros(self, state: dict[str, Any], key: str, values: torch.Tensor) -> PackedTensor:
        """What ``state`` has of this moment, or that of a parameter which was never stepped."""
        return state.get(key) or self.codec.empty(values.numel(), SIGNED[key], values)


class OwnEngine(Engine):
    """Unpacks the state of a piece of a parameter, lets the user's optimizer step that piece, and packs it again."""

    name = "memopt"

    @override
    def step(
        self,
        optimizer: Optimizer,
        values: torch.Tensor,
        gradients: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> dict[str, Any]:
        after = dict[str, Any]()
        size = PIECE.get(values.device.type, PIECE["other"])
        for start in range(0, max(1, values.numel()), size):  # an empty shard counts its steps as well
            span = _Span(start, min(start + size, values.numel()))
            piece = values[span.start : span.stop]
            piece.grad = gradients[span.start : span.stop]
            optimizer.state[piece] = {
                key: self._read(value, span).to(piece.dtype) if key in SIGNED else _copy(value)
                for key, value in state.items()
            }
            try:
                step_alone(optimizer, piece, group)
                self._write(optimizer.state[piece], state, after, span, values.numel())
            finally:
                del optimizer.state[piece]
        return after

    def _read(self, value: Any, span: "_Span") -> torch.Tensor:
        packed = as_packed(value)
        assert packed is not None, "state is packed when it is made and when it is loaded"
        return self.codec.unpack(packed, span.start, span.stop)

    def _write(
        self, state: dict[str, Any], before: dict[str, Any], after: dict[str, Any], span: "_Span", numel: int
    ) -> None:
        for key, value in state.items():
            if key not in SIGNED or value is None:
                after[key] = value
                continue
            if key not in after:
                after[key] = before.get(key) or self.codec.empty(numel, SIGNED[key], value)
            self.codec.write(after[key], span.start, value)


class _Span(NamedTuple):
    start: int
    stop: int


def _copy(value: Any) -> Any:
    """Each piece counts its own step, so that all of them see the same one."""
    return value.clone() if isinstance(value, torch.Tensor) else value
