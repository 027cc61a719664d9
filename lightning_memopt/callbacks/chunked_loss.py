"""The final linear layer and its loss without the full logits, for models that compute them as usual."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_memopt.models.instance_patch import Patches
from lightning_memopt.techniques.lazy_logits import lazy_logits


class ChunkedLoss(Callback):
    """Compute the language-model head and its cross-entropy in chunks of tokens: the full logits never exist.

    Finds the head of every Hugging Face model inside the LightningModule (causal, masked and encoder-decoder),
    whether the model computes the loss or ``training_step`` does from the logits. Acts in training; validation and
    generation form logits as always. Losses and gradients are the same up to floating-point order.

    Args:
        head: Qualified name of the final ``nn.Linear`` (``"decoder.head"``), for a model that is not Hugging Face's.

    Raises:
        MisconfigurationException: At the start of ``fit``, if no head is found or it cannot be chunked.
        LogitsNotFormedError: In the first step, if it uses the logits for anything but a cross-entropy of them.

    Source:
        Hsu et al. 2024 (https://arxiv.org/abs/2410.10989).

    Example:
        >>> trainer = pl.Trainer(callbacks=[ChunkedLoss()], logger=False)
    """

    def __init__(self, head: str | None = None) -> None:
        if head is not None and (not isinstance(head, str) or not head):
            raise MisconfigurationException(
                f"ChunkedLoss(head={head!r}) does not name a layer; give the qualified name of the final nn.Linear, "
                "such as 'model.lm_head', or nothing for a Hugging Face model."
            )
        self.head = head
        self._patches = Patches()

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        heads = {self.head: _named_head(pl_module, self.head)} if self.head else _language_model_heads(pl_module)
        try:
            for name, head in heads.items():
                self._patches.enter_context(lazy_logits(head, name))
        except ValueError as error:
            raise MisconfigurationException(f"ChunkedLoss: {error}") from error

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._patches.close()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._patches.close()


def _named_head(module: "pl.LightningModule", name: str) -> nn.Module:
    modules = dict(module.named_modules())
    if name not in modules:
        linears = [other for other, candidate in modules.items() if type(candidate) is nn.Linear]
        raise MisconfigurationException(
            f"ChunkedLoss(head={name!r}): {type(module).__name__} has no such submodule; its last linear layers are "
            f"{linears[-5:]}."
        )
    return modules[name]


def _language_model_heads(module: "pl.LightningModule") -> dict[str, Any]:
    """The output embeddings of the Hugging Face models in ``module``, by qualified name, each once."""
    names = {submodule: name for name, submodule in module.named_modules()}
    heads: dict[str, Any] = {}
    for submodule in names:
        get_output_embeddings = getattr(submodule, "get_output_embeddings", None)
        head = get_output_embeddings() if callable(get_output_embeddings) else None
        if isinstance(head, nn.Module):
            heads[names[head]] = head
    if not heads:
        raise MisconfigurationException(
            f"ChunkedLoss found no Hugging Face model with a language-model head in {type(module).__name__}, so "
            "there is no loss to chunk. Name the final linear layer, ChunkedLoss(head='...'), or call "
            "memopt.chunked_cross_entropy(hidden, weight, target) in training_step."
        )
    return heads
