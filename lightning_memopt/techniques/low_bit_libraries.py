"""Step parameters whose state is packed with the kernels of bitsandbytes or torchao.

torchao's tensors come from modules that it does not promise to keep. Tried with bitsandbytes 0.50 and torchao 0.18.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from typing_extensions import override

from lightning_memopt.models.fake import is_fake
from lightning_memopt.parallel.local import local_of
from lightning_memopt.techniques.blockwise import PackedTensor
from lightning_memopt.techniques.low_bit_engines import PIECE, Bits, Engine
from lightning_memopt.techniques.per_parameter import step_alone

_REMEDY = "Use the default engine ('memopt'), where the optimizer's own step runs."

_OPTIONS = ("amsgrad", "maximize", "nesterov", "dampening", "differentiable", "capturable")
"""What the optimizers of torch can do and the kernels of libraries cannot."""

_BITSANDBYTES_DEVICES = ("cpu", "cuda", "xpu")


class _Library(Engine):
    """What holds for the kernels of both libraries."""

    @override
    def find_problem(self, optimizer: Optimizer) -> str | None:
        kind = type(optimizer).__name__
        for index, group in enumerate(optimizer.param_groups):
            for option in _OPTIONS:
                if group.get(option):
                    return (
                        f"Group {index} of {kind} has {option}={group[option]!r}, which the kernels of {self.name} "
                        f"do not have. {_REMEDY}"
                    )
        # The mark of torch's fused step, which beside stepping unscales the gradients of fp16.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            return (
                f"{kind} has fused=True, and the kernels of {self.name} take the place of torch's fused ones. Leave "
                "fused out, or use the default engine ('memopt')."
            )
        return None

    @override
    def why_not(self, parameter: torch.Tensor) -> str | None:
        if parameter.dtype == torch.float64:
            return f"is float64, and {self.name} computes in float32. {_REMEDY}"
        return None

    @override
    @torch.no_grad()
    def try_out(self, optimizer: Optimizer) -> str | None:
        # The smallest, since what torchao compiles for it is what its step will use.
        pairs = ((group, p) for group in optimizer.param_groups for p in group["params"] if not p.is_meta)
        packed = [(group, p) for group, p in pairs if self.packs(p) and local_of(p).numel()]
        if not packed or any(is_fake(parameter) for _, parameter in packed):
            return None
        group, parameter = min(packed, key=lambda pair: local_of(pair[1]).numel())
        values = torch.zeros_like(local_of(parameter)).reshape(-1)
        try:
            self.step(optimizer, values, torch.zeros_like(values), {}, group)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            return (
                f"{self.name} cannot step a parameter on {values.device} in {values.dtype} "
                f"({type(error).__name__}: {reason}). {_REMEDY}"
            )
        return None


class BitsandbytesEngine(_Library):
    """Adam, AdamW and SGD with momentum by the 8-bit kernels of bitsandbytes."""

    name = "bitsandbytes"

    def __init__(self, bits: Bits) -> None:
        super().__init__(bits)
        with _disable_current_modes():  # it reads its levels while it makes them
            from bitsandbytes import functional

            levels = {signed: functional.create_dynamic_map(signed=signed).tolist() for signed in (True, False)}
        self._update = functional.optimizer_update_8bit_blockwise
        self._levels = {signed: torch.tensor(values) for signed, values in levels.items()}

    @override
    def why_not(self, parameter: torch.Tensor) -> str | None:
        if parameter.device.type not in _BITSANDBYTES_DEVICES:
            return (
                f"is on {parameter.device}, and bitsandbytes has optimizers for {', '.join(_BITSANDBYTES_DEVICES)} "
                f"alone. {_REMEDY}"
            )
        return super().why_not(parameter)

    @override
    def step(
        self,
        optimizer: Optimizer,
        values: torch.Tensor,
        gradients: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> dict[str, Any]:
        if isinstance(optimizer, SGD):
            # It knows the first step, whose gradient the momentum is, by its number, and asks no more of that.
            step = 1 if state.get("momentum_buffer") is None else 2
            moments = {"momentum_buffer": self.packed_or_zeros(state, "momentum_buffer", values)}
            kernel, betas, eps, after = "momentum", (group["momentum"], 0.0), 0.0, dict[str, Any](moments)
        else:
            moments = {key: self.packed_or_zeros(state, key, values) for key in ("exp_avg", "exp_avg_sq")}
            after = {"step": _next_step(state), **moments}
            kernel, step, betas, eps = "adam", int(after["step"]), group["betas"], group["eps"]
        weight_decay = float(group["weight_decay"])
        if weight_decay and kernel == "adam" and not group["decoupled_weight_decay"]:
            # Of itself it decays the weights as AdamW does, whatever its class is called.
            gradients, weight_decay = gradients.add(values, alpha=weight_decay), 0.0
        with _on_default_stream(values.device):
            # Its kernels for GPUs take no room beside their arguments; those for CPUs unpack all that they are given.
            size = PIECE["cpu"] if values.device.type == "cpu" else max(1, values.numel())
            for start in range(0, values.numel(), size):
                span = slice(start, min(start + size, values.numel()))
                first, *rest = [self._piece(packed, span) for packed in moments.values()]
                second = rest[0] if rest else _Piece(None, None, None)
                self._update(
                    kernel, gradients[span], values[span], first.codes, second.codes, float(betas[0]),
                    float(betas[1]), 0.0, 0.0, float(eps), step, float(group["lr"]), first.levels, second.levels,
                    first.scales, second.scales, weight_decay,
                )  # fmt: skip
        return after

    def _piece(self, packed: PackedTensor, span: slice) -> "_Piece":
        signed, block = packed["signed"], self.codec.block_size
        levels = self._levels[signed] = self._levels[signed].to(packed["codes"].device)
        return _Piece(packed["codes"][span], levels, packed["scales"][span.start // block : -(-span.stop // block)])


class TorchaoEngine(_Library):
    """Adam and AdamW by the compiled step of torchao, in 8 or 4 bits or float8."""

    name = "torchao"

    def __init__(self, bits: Bits) -> None:
        super().__init__(bits)
        with _disable_current_modes():  # it reads its levels while it makes them
            from torchao import optim
            from torchao.optim import subclass_4bit, subclass_8bit, subclass_fp8

            suffix, tensors = {
                8: ("8bit", subclass_8bit.OptimState8bit), 4: ("4bit", subclass_4bit.OptimState4bit),
                "fp8": ("Fp8", subclass_fp8.OptimStateFp8),
            }[bits]  # fmt: skip
            self._optimizers = {
                decoupled: getattr(optim, f"{kind}{suffix}")([torch.zeros(1)])
                for kind, decoupled in (("AdamW", True), ("Adam", False))
            }
            self._tensor: Any = tensors
            self._levels = dict[bool, torch.Tensor]()
            if bits != "fp8":
                levels: Any = subclass_8bit if bits == 8 else subclass_4bit
                self._levels = {
                    True: torch.tensor(levels.get_qmap_signed()),
                    False: torch.tensor(levels.get_qmap_unsigned()),
                }

    @override
    def packs(self, parameter: torch.Tensor) -> bool:
        # As torchao itself does: it has no blocks that are cut short.
        return super().packs(parameter) and local_of(parameter).numel() % self.codec.block_size == 0

    @override
    def find_problem(self, optimizer: Optimizer) -> str | None:
        if isinstance(optimizer, SGD):
            return (
                f"The optimizer is {type(optimizer).__name__}, and torchao has Adam and AdamW alone. Use "
                "engine='bitsandbytes' or the default engine ('memopt')."
            )
        if _get_current_dispatch_mode_stack():
            return (
                "torchao compiles its step, which cannot be while memory is predicted or measured by operator "
                "(predict_memory, measure_memory). Do that with the default engine ('memopt'), whose state takes the "
                "same bytes."
            )
        return super().find_problem(optimizer)

    @override
    def step(
        self,
        optimizer: Optimizer,
        values: torch.Tensor,
        gradients: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> dict[str, Any]:
        moments = {key: self.packed_or_zeros(state, key, values) for key in ("exp_avg", "exp_avg_sq")}
        step = _next_step(state)
        if values.numel():
            theirs = self._optimizers[bool(group["decoupled_weight_decay"])]
            wrapped = {key: self._wrapped(packed, values) for key, packed in moments.items()}
            theirs.state = {values: {"step": step - 1, **wrapped}}
            values.grad = gradients
            options = {
                "lr": torch.tensor(float(group["lr"]), dtype=torch.float32),
                "betas": tuple(map(float, group["betas"])),
                "eps": float(group["eps"]),
                "weight_decay": float(group["weight_decay"]),
                "amsgrad": False,
            }
            try:
                with _disable_current_modes():  # nothing is compiled under a monitor that watches operators
                    step_alone(theirs, values, options)
            finally:
                theirs.state = {}
        return {"step": step, **moments}

    def _wrapped(self, packed: PackedTensor, values: torch.Tensor) -> torch.Tensor:
        """Torchao's tensor over the memory of ``packed``."""
        codes, scales, signed, dtype = packed["codes"], packed["scales"], packed["signed"], packed["dtype"]
        if not self._levels:
            return self._tensor(codes.view(torch.float8_e4m3fn), scales, dtype)
        levels = self._levels[signed] = self._levels[signed].to(values.device)
        shape = (values.shape,) if self.codec.format_name == "4-bit" else ()
        return self._tensor(codes, scales, levels, signed, *shape, dtype)


class _Piece(NamedTuple):
    codes: torch.Tensor | None
    levels: torch.Tensor | None
    scales: torch.Tensor | None


def _next_step(state: dict[str, Any]) -> torch.Tensor:
    """The number of the step that is taken, counted as torch's optimizers count."""
    return state.get("step", torch.tensor(0.0, dtype=torch.float32)) + 1


@contextmanager
def _on_default_stream(device: torch.device) -> Iterator[None]:
    """Order what is launched on the default stream, whatever is the current one: bitsandbytes knows no other.

    FSDP2 reduces gradients, and so steps parameters in the backward, on a stream of its own.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    yield
    current.wait_stream(default)
