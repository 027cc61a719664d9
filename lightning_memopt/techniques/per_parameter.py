"""Step one parameter of an optimizer at a time, with the user's own optimizer object."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from lightning_memopt.models.fake import is_fake

StepParameter = Callable[[Optimizer, torch.Tensor, int], None]
"""Steps one parameter, given its optimizer and the index of its group there."""

SurroundStep = Callable[[torch.Tensor], AbstractContextManager[torch.Tensor]]
"""Makes the context in which a parameter is stepped; its value is what is stepped in the parameter's place."""

_REPLACEMENT = "_memopt_step_one"
_SURROUNDING = "_memopt_surround_step"


def step_one(optimizer: Optimizer, parameter: torch.Tensor, group_index: int | None = None) -> None:
    """Let ``optimizer`` step ``parameter`` alone, as if it were its only one.

    For the length of the call the optimizer sees one group with one parameter and the hyper-parameters that the
    parameter's group has at that moment. So its state, ``state_dict``, learning-rate schedulers and checkpoints
    are those of the plain optimizer. The optimizer's step hooks do not run here: they belong to the whole step,
    and run where the training loop calls ``optimizer.step``. A parameter without a gradient is left alone.

    Not safe from several threads at once for one optimizer; calling it from within ``optimizer.step(closure)``
    (where Lightning runs the backward) is fine.

    Args:
        optimizer: Any optimizer that accepts :func:`check_steps_alone`.
        parameter: One of its parameters; its ``grad`` is used as it is, and stays.
        group_index: Index of the parameter's group, where the caller knows it; looked up otherwise.

    Raises:
        ValueError: ``parameter`` is not one of the optimizer's.

    Example:
        >>> parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
        >>> optimizer = torch.optim.SGD(parameters, lr=0.5)
        >>> parameters[0].grad = torch.ones(2)
        >>> step_one(optimizer, parameters[0])
        >>> parameters[0].tolist(), parameters[1].tolist()
        ([0.5, 0.5], [1.0, 1.0])
    """
    index = find_group(optimizer, parameter) if group_index is None else group_index
    replacement: StepParameter = optimizer.__dict__.get(_REPLACEMENT, _step_plainly)
    surrounding: SurroundStep = optimizer.__dict__.get(_SURROUNDING, _in_nothing)
    with surrounding(parameter) as stepped:
        replacement(optimizer, stepped, index)


def step_alone(optimizer: Optimizer, parameter: torch.Tensor, group: dict[str, Any]) -> None:
    """Step ``parameter``, which may be a stand-in for one of the optimizer's, with the hyper-parameters of ``group``.

    Unlike :func:`step_one` this never asks what :func:`replace_step` put in: it is what such functions build on.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        _unhooked_step(optimizer)(optimizer)
    finally:
        optimizer.param_groups = groups


def replace_step(optimizer: Optimizer, step: StepParameter | None) -> None:
    """Make :func:`step_one` on ``optimizer`` call ``step``; ``None`` takes it back.

    So a technique that keeps state in another form (fewer bits) and one that decides when a parameter is stepped
    (in the backward) need not know of each other.
    """
    if step is None:
        optimizer.__dict__.pop(_REPLACEMENT, None)
    else:
        optimizer.__dict__[_REPLACEMENT] = step


def surround_step(optimizer: Optimizer, context: SurroundStep | None) -> None:
    """Make :func:`step_one` on ``optimizer`` step within ``context(parameter)``; ``None`` takes it back.

    For a technique that stores weights in another form (fewer bits) than the one in which they are stepped. The
    context is entered around whatever :func:`replace_step` put in.
    """
    if context is None:
        optimizer.__dict__.pop(_SURROUNDING, None)
    else:
        optimizer.__dict__[_SURROUNDING] = context


def find_group(optimizer: Optimizer, parameter: torch.Tensor) -> int:
    """Index of the group of ``optimizer`` that holds ``parameter``.

    Raises:
        ValueError: None does.
    """
    for index, group in enumerate(optimizer.param_groups):
        if any(candidate is parameter for candidate in group["params"]):
            return index
    raise ValueError(
        f"A parameter of shape {tuple(parameter.shape)} is in no group of {type(optimizer).__name__}, so it cannot "
        "be stepped; add it with `optimizer.add_param_group`."
    )


def check_steps_alone(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step is more than the sum of its parameters' steps.

    Tried, not looked up by name: stand-ins of a few elements, with the optimizer's own hyper-parameters, are stepped
    three times together and three times one by one, each time followed by the training loop's step, which finds no
    gradients. An optimizer that needs a closure (LBFGS, SAM) or a norm over all gradients gives other numbers or
    fails; so does one that changes parameters without a gradient. Neither the optimizer nor the random number
    generators are changed. The stand-ins have values where the parameters are fake, which have none.

    Args:
        optimizer: The optimizer to try.

    Raises:
        ValueError: It cannot step one parameter at a time; says what was seen.
    """
    name = type(optimizer).__name__
    remedy = "use an optimizer that treats each parameter by itself, such as AdamW, Adam, SGD or RMSprop."
    for index, group in enumerate(optimizer.param_groups):
        like = next((parameter for parameter in group["params"] if not parameter.is_meta), None)
        if like is None:  # it is empty, or other ranks hold all of it
            continue
        try:
            with _disable_current_modes():
                together = _train_stand_ins(optimizer, group, like, _step_all)
                alone = _train_stand_ins(optimizer, group, like, _step_each)
                is_same = all(
                    torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(together, alone, strict=True)
                )
        except Exception as error:
            raise ValueError(
                f"{name} cannot step one parameter at a time (tried on group {index}: "
                f"{type(error).__name__}: {error}); {remedy}"
            ) from error
        if not is_same:
            raise ValueError(
                f"{name} steps its parameters jointly: on group {index}, one parameter at a time, and a step that "
                "found no gradients after that, gave other weights than all at once, so gradients cannot be freed "
                f"one by one; {remedy}"
            )


def _in_nothing(parameter: torch.Tensor) -> AbstractContextManager[torch.Tensor]:
    return nullcontext(parameter)


def _step_plainly(optimizer: Optimizer, parameter: torch.Tensor, group_index: int) -> None:
    step_alone(optimizer, parameter, optimizer.param_groups[group_index])


def _unhooked_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The step of the optimizer's class without the wrapper (from ``Optimizer.__init__``) that runs the hooks."""
    step: Any = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _train_stand_ins(
    optimizer: Optimizer, group: dict[str, Any], like: torch.Tensor, step: Callable[[Optimizer], None]
) -> list[nn.Parameter]:
    wants_sparse = isinstance(optimizer, torch.optim.SparseAdam)  # and takes no others
    shape = [min(size, 4) for size in like.shape]
    generator = torch.Generator().manual_seed(0)
    stand_ins = [nn.Parameter(torch.randn(shape, generator=generator).to(like.device)) for _ in range(2)]
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    for patch in ("step", _REPLACEMENT):
        twin.__dict__.pop(patch, None)
    twin.state = defaultdict(dict, {stand_in: _first_state(optimizer, like, shape) for stand_in in stand_ins})
    twin.param_groups = [{name: _with_value(option) for name, option in group.items()} | {"params": stand_ins}]
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    # Forked, so that an optimizer that draws noise draws the same when its parameters are stepped one by one.
    with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
        for _ in range(3):
            for scale, stand_in in enumerate(stand_ins, start=1):
                gradient = scale * torch.randn(shape, generator=generator).to(like.device)
                stand_in.grad = gradient.to_sparse(1) if wants_sparse else gradient
            step(twin)
    return stand_ins


def _with_value(option: Any) -> Any:
    """A hyper-parameter as it is, or any small number where it is a tensor (``lr``) whose value is not known."""
    return torch.full(option.shape, 1e-3) if isinstance(option, torch.Tensor) and is_fake(option) else option


def _first_state(optimizer: Optimizer, like: torch.Tensor, shape: list[int]) -> dict[str, Any]:
    """What a stand-in begins with: nothing, or zeros where a constructor made the state (Adagrad's in torch 2.11)."""
    state = optimizer.state.get(like, {})
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        return {}
    return {
        name: torch.zeros(shape if value.shape == like.shape else value.shape, dtype=value.dtype, device=value.device)
        for name, value in state.items()
    }


def _step_all(optimizer: Optimizer) -> None:
    _unhooked_step(optimizer)(optimizer)


def _step_each(optimizer: Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        step_one(optimizer, parameter, 0)
        parameter.grad = None
    _step_all(optimizer)  # as the training loop does, which finds no gradients
