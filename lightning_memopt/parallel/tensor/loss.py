"""The loss from logits that stay split by class: no rank ever holds those of the whole vocabulary.

The cross-entropy is ``torch.distributed.tensor.parallel.loss_parallel``'s. Its operators know nothing but
``DTensor``, so this finds the call in the user's step and gives back a plain loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_memopt.parallel.refusal import StepRefused
from lightning_memopt.parallel.tensor.apply import TensorParallel


def split_losses(split: TensorParallel) -> list[str]:
    """Let the heads of a split module give shards of logits, and name them.

    Heads are the output embeddings of the Hugging Face models inside, or else the last layer that stands alone.

    Raises:
        ValueError: No head is split.
    """
    entries = {n: e for n, e in split.plan.entries.items() if e.style == "colwise" and e.group is None}
    names = {submodule: name for name, submodule in split.module.named_modules()}
    heads = []
    for submodule in names:
        get_head = getattr(submodule, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module) and names.get(head) in entries:
            heads.append(names[head])
    heads = sorted(set(heads)) or list(entries)[-1:]
    if not heads:
        raise ValueError(
            "loss_parallel=True, and no linear layer that makes class logits is split (describe() says why each is "
            "whole); leave loss_parallel out."
        )
    for name in heads:
        vars(split.module.get_submodule(name))["_tensor_split"].gives_shards = True
    return heads


@contextmanager
def losses_of_shards(heads: list[str]) -> Iterator[None]:
    """Around the forward of a step: cross-entropies of split logits are computed so, and are plain tensors.

    Raises:
        StepRefused: Something else than a cross-entropy was done with the logits.
    """
    try:
        with loss_parallel(), _PlainLosses():
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "DTensor" not in str(error) and "sharding strategy" not in str(error):
            raise
        raise StepRefused(
            f"loss_parallel=True, and the step does something with the logits of `{heads[0]}` that is no "
            f"cross-entropy of them, for which it needs them whole ({str(error).splitlines()[0]}); leave "
            "loss_parallel out."
        ) from error


class _PlainLosses(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.cross_entropy and isinstance(result, DTensor):
            return result.full_tensor()
        return result
