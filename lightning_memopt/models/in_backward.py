"""Whether autograd runs a backward, which torch has no public way to tell (2.11 to 2.13)."""

import torch


def is_in_backward() -> bool:
    """Whether the caller runs within a backward, as a forward does that is computed again for it."""
    return torch._C._current_graph_task_id() != -1
