"""Read from a module and its batch what a plan may switch on, before anything is traced."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.models.blocks import find_block_stacks
from lightning_memopt.parallel.agreement import find_batch_norms
from lightning_memopt.planning.build import build_fake
from lightning_memopt.planning.fake import fake_copy, tensors_of
from lightning_memopt.planning.known_values import stays_real
from lightning_memopt.planning.predict import Module
from lightning_memopt.planning.space import Space, Techniques, halvings
from lightning_memopt.techniques.batches import batch_size
from lightning_memopt.techniques.counting import IGNORED_LABEL


def without_memory(module: Module) -> pl.LightningModule:
    """The module to look at; one that a function makes is made without memory for its parameters."""
    if isinstance(module, pl.LightningModule):
        return module
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = build_fake(module, mode)
    if isinstance(made, pl.LightningModule):
        with mode:
            made.configure_model()
    return made


def can_be_copied(module: pl.LightningModule) -> bool:
    """Whether a prediction can begin with a copy, which takes less time than to make the module again."""
    try:
        fake_copy(FakeTensorMode(), module)
    except Exception:  # of the user's classes, or tensors that are no parameters nor buffers
        return False
    return True


def read_space(module: pl.LightningModule, batch: Any, precision: str, trainer_options: dict[str, Any]) -> Space:
    """What can be switched on without changing what the module learns.

    Args:
        module: It is only read.
        batch: A batch of one device.
        precision: The user's ``Trainer(precision=...)``.
        trainer_options: The user's other arguments of ``pl.Trainer``.
    """
    automatic = module.automatic_optimization
    clips_by_norm = (
        bool(trainer_options.get("gradient_clip_val"))
        and trainer_options.get("gradient_clip_algorithm", "norm") != "value"
    )
    accumulates = trainer_options.get("accumulate_grad_batches", 1) > 1
    return Space(
        Techniques(precision=precision),
        halvings(_samples(batch))
        if automatic and not (find_batch_norms(module) or ignores_unequal_targets(batch))
        else (),
        chunked_loss=_has_head(module),
        in_backward=automatic
        and not (clips_by_norm or accumulates or is_overridden("configure_gradient_clipping", module)),
        accumulates=accumulates,
    )


def ignores_unequal_targets(batch: Any) -> bool:
    """Whether samples hold unequal numbers of labels that a mean leaves out, by which micro-batches do not weigh."""
    ignored = [
        (tensor == IGNORED_LABEL).flatten(1).sum(1)
        for tensor in tensors_of(batch)
        if tensor.dim() > 1 and stays_real(tensor)
    ]
    return any(bool((each != each[:1]).any()) for each in ignored)


def most_stages(module: pl.LightningModule, batch: Any) -> int:
    """Into how many stages of a pipeline ``module`` and ``batch`` can be cut at most; 1 for no pipeline."""
    is_usual = module.automatic_optimization and not is_overridden("backward", module)
    if not is_usual or find_batch_norms(module):
        return 1
    blocks = sum(map(len, find_block_stacks(module)))
    layers = sum(next(each.parameters(recurse=False), None) is not None for each in module.modules())
    return min(blocks if blocks > 1 else layers, _samples(batch))


def check_budget(module: pl.LightningModule, budget_bytes: int, *, ways: int, least_itemsize: int) -> None:
    """Refuse a budget that not even the parameters of one block, or layer of a module without blocks, fit in.

    Args:
        module: It is only read.
        budget_bytes: Of a device.
        ways: Among how many devices at most a block is split while it computes.
        least_itemsize: Bytes of an element in the lowest precision that may be chosen.

    Raises:
        ValueError: Names the block, or the layer of a module without blocks, and its bytes.
    """

    def least_bytes(parameters: Iterable[nn.Parameter]) -> int:
        return sum(each.numel() * min(each.itemsize, least_itemsize) for each in parameters) // ways

    sizes = {
        name: least_bytes(block.parameters())
        for stack in find_block_stacks(module)
        for name, block in zip(stack.names, stack.blocks, strict=True)
    } or {name: least_bytes(layer.parameters(recurse=False)) for name, layer in module.named_modules()}
    name = max(sizes, key=lambda each: sizes[each], default="")
    if name and sizes[name] > budget_bytes:
        share = f" on each of {ways} devices that share it" if ways > 1 else ""
        raise ValueError(
            f"the budget of {format_bytes(budget_bytes)} is smaller than the parameters of one block: `{name}` has "
            f"{format_bytes(sizes[name])} ({sizes[name]:,} bytes){share}, and a device holds at least one "
            "block while it computes; give a larger budget"
        )


def _samples(batch: Any) -> int:
    try:
        return batch_size(batch)
    except ValueError:
        return 1  # what cannot be counted cannot be split either


def _has_head(module: nn.Module) -> bool:
    """Whether some model of Hugging Face's in ``module`` has a head whose loss can be chunked."""
    for submodule in module.modules():
        get_output_embeddings = getattr(submodule, "get_output_embeddings", None)
        if callable(get_output_embeddings) and type(get_output_embeddings()) is nn.Linear:
            return True
    return False
