"""Read from a module and its batch what a plan may switch on, before anything is traced."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.parallel.agreement import find_batch_norms
from lightning_memopt.planning.predict import Module
from lightning_memopt.planning.space import Space, Techniques, halvings
from lightning_memopt.techniques.batches import batch_size


def without_memory(module: Module) -> pl.LightningModule:
    """The module to look at; one that a function makes is made without memory for its parameters."""
    if isinstance(module, pl.LightningModule):
        return module
    with FakeTensorMode():
        made = module()
        if isinstance(made, pl.LightningModule):
            made.configure_model()
    return made


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
        halvings(_samples(batch)) if automatic and not find_batch_norms(module) else (),
        chunked_loss=_has_head(module),
        in_backward=automatic
        and not (clips_by_norm or accumulates or is_overridden("configure_gradient_clipping", module)),
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
