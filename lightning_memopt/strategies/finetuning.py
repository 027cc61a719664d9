"""Lightning's finetuning callbacks, where ranks hold parts of a module."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer


@contextmanager
def unfreezing_by_identity() -> Iterator[None]:
    """Within the block, what finetuning callbacks unfreeze is not added to an optimizer that has it already.

    Lightning compares the values of parameters to find out. Values of parts are not those of the whole, differ
    between ranks, and are missing on the ranks that hold other stages. It calls its function by the class, so that
    is where it is replaced.
    """
    lightnings = BaseFinetuning.__dict__["filter_on_optimizer"]
    BaseFinetuning.filter_on_optimizer = staticmethod(_not_yet_in)  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseFinetuning.filter_on_optimizer = lightnings  # type: ignore[method-assign]


def _not_yet_in(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    given = list(params)
    new = [parameter for parameter in given if id(parameter) not in known]
    if len(new) < len(given):
        rank_zero_warn(
            f"{len(given) - len(new)} of the parameters to be unfrozen are in the {type(optimizer).__name__} already "
            "and stay in the group where they are. Give it only `p for p in self.parameters() if p.requires_grad` "
            "in `configure_optimizers`."
        )
    return new
