"""Estimate what each technique would have saved of the memory that was in use."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_memopt.memory.live import LiveTensor
from lightning_memopt.memory.report import format_bytes
from lightning_memopt.models.blocks import find_block_stacks

_WORTH_SAYING = 0.01
_CHUNKS = 16
_LOW_BITS = 8


@dataclass(frozen=True)
class Remedy:
    """A technique and what it is estimated to save.

    Attributes:
        technique: As the user would write it (``"ActivationCheckpointing('full')"``).
        saves_bytes: Estimate of the bytes it frees. The savings of several techniques do not simply add up.
        formula: How the estimate was made, in words and figures.
    """

    technique: str
    saves_bytes: int
    formula: str


def estimate_remedies(
    live: Sequence[LiveTensor],
    module: nn.Module,
    requested_batch_bytes: int = 0,
    requested_state_bytes: int = 0,
    *,
    is_training: bool = True,
) -> list[Remedy]:
    """What would have helped and by how much, the most helpful first.

    The estimates are made from the tensors that were alive, not from the model's definition: a technique that is
    already on has little left to save and drops out, as does all that saves less than 1% of what was in use.

    Args:
        live: The tensors in use, from :func:`~lightning_memopt.memory.live.find_live_tensors`.
        module: The model, for its blocks, its vocabulary, and whether it optimizes by itself
            (``automatic_optimization = False``), which leaves techniques out that change the loop's steps.
        requested_batch_bytes: Size of the allocation that failed, if it grows with the batch.
        requested_state_bytes: The same, if it was to be optimizer state of 32 bits.
        is_training: Whether a training step failed; the batches of a validation are not split.
    """
    is_manual = not getattr(module, "automatic_optimization", True)
    if not is_training:
        halving = "Half the batch_size of the validation's DataLoader"
    elif is_manual:
        halving = "techniques.micro_batching.backward_in_micro_batches with half the batch"
    else:
        halving = "MicroBatching with half the batch"
    candidates = (
        _full_checkpointing(live, module),
        _half_the_batch(live, requested_batch_bytes, halving),
        _chunked_loss(live, module),
        _low_bit_state(live, requested_state_bytes),
        None if is_manual else _optimizer_in_backward(live),
        _half_precision(live),
    )
    least = _WORTH_SAYING * _total(live)
    worthwhile = [remedy for remedy in candidates if remedy is not None and remedy.saves_bytes > least]
    return sorted(worthwhile, key=lambda remedy: -remedy.saves_bytes)


def _full_checkpointing(live: Sequence[LiveTensor], module: nn.Module) -> Remedy | None:
    blocks = [name for stack in find_block_stacks(module) for name in stack.names]
    by_block: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    for tensor in _of(live, "activations"):
        block = next((name for name in blocks if f"{tensor.submodule}.".startswith(f"{name}.")), None)
        if block is not None:
            by_block[block] += tensor.size_bytes
            sizes[tensor.size_bytes] += 1
    if len(by_block) < 2:
        return None
    # In a block most tensors have the size of the hidden states that enter it.
    inlet = sizes.most_common(1)[0][0]
    whole, largest = sum(by_block.values()), max(by_block.values())
    formula = (
        f"activations inside {len(by_block)} blocks ({format_bytes(whole)}) minus the largest block, which is "
        f"recomputed as a whole ({format_bytes(largest)}), minus one kept input a block "
        f"({len(by_block)} x {format_bytes(inlet)})"
    )
    return Remedy("ActivationCheckpointing('full')", whole - largest - len(by_block) * inlet, formula)


def _half_the_batch(live: Sequence[LiveTensor], requested_bytes: int, technique: str) -> Remedy:
    size = _total(_of(live, "activations", "temporaries"))
    formula = (
        f"half of activations and temporaries ({format_bytes(size)}) and of the allocation that failed "
        f"({format_bytes(requested_bytes)}), all proportional to the batch"
    )
    return Remedy(technique, (size + requested_bytes) // 2, formula)


def _chunked_loss(live: Sequence[LiveTensor], module: nn.Module) -> Remedy | None:
    embedded = {layer.num_embeddings for layer in module.modules() if isinstance(layer, nn.Embedding)}
    projected = {layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)}
    vocabularies = embedded & projected
    logits = [t for t in _of(live, "activations", "temporaries", "other") if t.shape and t.shape[-1] in vocabularies]
    if not logits:
        return None
    size = _total(logits)
    formula = (
        f"all tensors with the vocabulary ({logits[0].shape[-1]}) as last dimension ({format_bytes(size)}), "
        f"of which one chunk in {_CHUNKS} exists at a time"
    )
    return Remedy("ChunkedLoss()", size - size // _CHUNKS, formula)


def _low_bit_state(live: Sequence[LiveTensor], requested_bytes: int) -> Remedy:
    wide = [tensor for tensor in _of(live, "optimizer_state") if tensor.dtype in ("float32", "float64")]
    size = _total(wide)
    kept = sum(tensor.size_bytes * _LOW_BITS // int(tensor.dtype.removeprefix("float")) for tensor in wide)
    failed = f" and the allocation that failed ({format_bytes(requested_bytes)})" if requested_bytes else ""
    formula = f"optimizer state kept in 32 bits or more ({format_bytes(size)}){failed} at {_LOW_BITS} bits a value"
    saved_of_failed = requested_bytes - requested_bytes * _LOW_BITS // 32
    return Remedy(f"LowBitOptimizer(bits={_LOW_BITS})", size - kept + saved_of_failed, formula)


def _optimizer_in_backward(live: Sequence[LiveTensor]) -> Remedy | None:
    gradients = _of(live, "gradients")
    if not gradients:
        return None
    size, largest = _total(gradients), max(tensor.size_bytes for tensor in gradients)
    formula = f"all gradients ({format_bytes(size)}) but the largest ({format_bytes(largest)})"
    return Remedy("OptimizerInBackward()", size - largest, formula)


def _half_precision(live: Sequence[LiveTensor]) -> Remedy:
    wide = [t for t in _of(live, "parameters", "gradients", "activations", "temporaries") if t.dtype == "float32"]
    size = _total(wide)
    formula = f"half of the 32-bit parameters, gradients and activations ({format_bytes(size)})"
    return Remedy("HalfPrecision('bf16')", size // 2, formula)


def _of(live: Iterable[LiveTensor], *categories: str) -> list[LiveTensor]:
    return [tensor for tensor in live if tensor.category in categories]


def _total(live: Iterable[LiveTensor]) -> int:
    return sum(tensor.size_bytes for tensor in live)
