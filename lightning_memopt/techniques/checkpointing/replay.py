"""Run a region a second time and leave everything but its activations as the first time left it.

torch's random state and autocast are put back by ``torch.utils.checkpoint``. This adds Python's and NumPy's, that of
generators which the region holds, the plain attributes of its modules, and the buffers: BatchNorm's running
statistics and counters, the power iteration of spectral normalization, anything that a forward writes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_memopt.techniques.checkpointing.arguments import Build
from lightning_memopt.techniques.checkpointing.attributes import Attributes
from lightning_memopt.techniques.host_random import HostRandomState, generators_among, generators_of, host_random_kept

ALWAYS_COPIED = 2**16
"""Bytes up to which a buffer is copied before each call, as warm-ups and observers first write on a later one."""

_Buffers = list[tuple[nn.Module, str, torch.Tensor]]


class _Seen(NamedTuple):
    """A buffer before a call."""

    owner: nn.Module
    name: str
    buffer: torch.Tensor
    version: int
    copy: torch.Tensor | None


class _AtStart(NamedTuple):
    """What a call needs until it has run."""

    first: Callable[[], Any]
    seen: list[_Seen]
    random: HostRandomState


class WrittenBuffers:
    """The buffers of a region that its forward changes: BatchNorm's, and those seen to change in a call.

    Tensors in plain attributes count as buffers where they are changed in place; what else becomes of attributes is
    for :class:`~lightning_memopt.techniques.checkpointing.attributes.Attributes`.

    Attributes:
        generators: Random generators that the region holds.
    """

    def __init__(self, module: nn.Module) -> None:
        self.generators = generators_of(module)
        self._module = module
        self._parameters = [(m, name) for m in module.modules() for name in m._parameters]
        # BatchNorm's kernels write the running statistics without counting a version.
        self._written: set[tuple[nn.Module, str]] = {
            (owner, name) for owner in module.modules() if isinstance(owner, _NormBase) for name in owner._buffers
        }
        self._has_run = False

    def parameter_versions(self) -> list[tuple[str, torch.Tensor, int]]:
        """The parameters that are there, by what owns them, and how often each was written to in place."""
        found = ((owner, name, owner._parameters.get(name)) for owner, name in self._parameters)
        return [
            (f"{type(owner).__name__} writes its parameter {name!r}", parameter, _version(parameter))
            for owner, name, parameter in found
            if parameter is not None and not is_lazy(parameter)
        ]

    def replaced_parameters(self) -> list[tuple[nn.Module, str, torch.Tensor]]:
        """Tensors that stand in the place of parameters for now, by ``torch.func.functional_call``."""
        found: list[tuple[nn.Module, str, torch.Tensor]] = []
        for owner, name in self._parameters:
            tensor = owner._parameters.get(name)
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                found.append((owner, name, tensor))
        return found

    def attributes(self) -> Attributes:
        """What the region's modules hold beside these."""
        return Attributes(self._module)

    def before(self) -> list[_Seen]:
        """The buffers, with copies of those that the coming call may change; of all of them before the first call."""
        seen = []
        for owner, name, buffer in _tensors(self._module):
            copies = not self._has_run or (owner, name) in self._written or buffer.nbytes <= ALWAYS_COPIED
            seen.append(_Seen(owner, name, buffer, _version(buffer), buffer.detach().clone() if copies else None))
        return seen

    def learn(self, before: list[_Seen]) -> _Buffers:
        """After a call, keep only the copies of the buffers that calls do change."""
        self._has_run = True
        kept = []
        for owner, name, buffer, version, copy in before:
            is_unwritten = _version(buffer) == version
            if (owner, name) not in self._written:
                if is_unwritten and (_holder(owner, name).get(name) is buffer or name not in owner._buffers):
                    continue
                self._written.add((owner, name))
            if copy is None and is_unwritten:  # another was put in its place
                copy = buffer.detach()
            if copy is None:
                raise RuntimeError(
                    f"{type(owner).__name__} writes its buffer {name!r} in place, and did not in the first call, so "
                    "that what it held was not kept for the recomputation. Leave its block out with `modules=`, or "
                    "assign a new tensor to the buffer instead."
                )
            kept.append((owner, name, copy))
        return kept


def refuse_written(before: list[tuple[str, torch.Tensor, int]]) -> None:
    """Raise a :class:`RuntimeError` where the run since :meth:`WrittenBuffers.parameter_versions` wrote to one."""
    for found, parameter, version in before:
        if _version(parameter) != version:
            raise RuntimeError(
                f"{found} in its forward, which recomputation would do once more and with other results. Make it a "
                "buffer (`register_buffer`), which is put back, write to it in `on_train_batch_end`, or leave its "
                "block out with `modules=`."
            )


class Replayable:
    """One call of a region, to be run by ``torch.utils.checkpoint``: for real first, as a replay after that.

    Make it right before the run. Copies of buffers are made here and in :attr:`replaying`, and not in the run and the
    replay: there torch counts the operators, of which it finds again what it kept.

    Args:
        name: The region's.
        run: Its own forward.
        first: The same with the caller's own arguments, to which the forward may write.
        leaves: What these arguments consist of.
        build: Makes arguments for a replay of their leaves.
        buffers: What it may write.
        on_replay: Called when the backward asks for the first replay.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        first: Callable[[], Any],
        leaves: Sequence[Any],
        build: Build,
        buffers: WrittenBuffers,
        on_replay: Callable[[], None],
    ) -> None:
        self._name = name
        self._run = run
        self._build = build
        self._buffers = buffers
        self._on_replay = on_replay
        self._generators = [*buffers.generators, *generators_among(leaves)]
        self._attributes = buffers.attributes()
        self._replaced_parameters = buffers.replaced_parameters()
        seen, random = buffers.before(), HostRandomState(self._generators)
        self._at_start: _AtStart | None = _AtStart(first, seen, random)  # None once it has run
        self._before: _Buffers = []
        self._random: HostRandomState | None = None  # where the run drew from generators that torch leaves alone

    def __call__(self, *leaves: Any) -> Any:
        """Run the region on the leaves of its arguments and return what it returns."""
        if self._at_start is not None:
            (first, seen, random), self._at_start = self._at_start, None
            parameters = self._buffers.parameter_versions()
            inputs = [(leaf, _version(leaf)) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            out = first()
            refuse_written(parameters)
            self._refuse_changed(inputs, out)
            self._before = self._buffers.learn(seen)
            if self._generators or not random.is_now():
                self._random = random
            return out
        self._on_replay()
        args, kwargs = self._build(leaves)
        try:
            return self._run(*args, **kwargs)
        except RuntimeError as error:
            if "backward an extra time" not in str(error):
                raise
            raise RuntimeError(
                f"{self._name} is recomputed for a second backward (of a gradient penalty, with "
                "`create_graph=True`, or `retain_graph=True`), and the first has used up the results that the "
                "policy keeps of it; use the policy 'full', which keeps none, or leave the block out with "
                "`modules=`"
            ) from error

    def _refuse_changed(self, inputs: list[tuple[torch.Tensor, int]], out: Any) -> None:
        """Say now, and by name, what autograd would only say in the backward."""
        changed = next((tensor for tensor, version in inputs if _version(tensor) != version), None)
        if changed is not None and any(getattr(leaf, "requires_grad", False) for leaf in tree_leaves(out)):
            raise RuntimeError(
                f"{self._name} changes an input of shape {tuple(changed.shape)} in place, which its recomputation "
                "would find changed already. Let it make a new tensor (`x = x + y` for `x += y`, `relu(x)` for "
                "`relu_(x)`), or leave it out with `modules=`."
            )

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within the block buffers, attributes and generators are as they were before the run, for a replay."""
        drawing_again = nullcontext() if self._random is None else host_random_kept(self._generators, self._random)
        parameters = _replaced(self._replaced_parameters)
        with self._attributes.put_back(), parameters, _swapped(self._before), drawing_again:
            yield


class Around(AbstractContextManager[None]):
    """Enters ``outer()`` and then ``inner``, as often as it is entered: torch enters it again for each replay."""

    def __init__(self, outer: Callable[[], AbstractContextManager[Any]], inner: AbstractContextManager[Any]) -> None:
        self._outer = outer
        self._inner = inner
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._outer())
            stack.enter_context(self._inner)
            self._entered.append(stack.pop_all())

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)


@contextmanager
def _swapped(before: _Buffers) -> Iterator[None]:
    """Let the replay read and write copies of the buffers as they were before the first run."""
    holders = [_holder(owner, name) for owner, name, _ in before]
    current = [(holder, name, holder[name]) for holder, (_, name, _) in zip(holders, before, strict=True)]
    try:
        for holder, (_, name, copy) in zip(holders, before, strict=True):
            holder[name] = copy.clone()
        yield
    finally:
        for holder, name, buffer in current:
            holder[name] = buffer


@contextmanager
def _replaced(parameters: Sequence[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    """Let the replay of a functional call read what stood in the place of parameters."""
    current = [(owner._parameters, name, owner._parameters[name]) for owner, name, _ in parameters]
    try:
        for owner, name, tensor in parameters:
            owner._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for held, name, parameter in current:
            held[name] = parameter


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Buffers, and attributes that are tensors; not such as are part of a graph, which nothing may write to."""
    for owner in module.modules():
        for name, value in owner._buffers.items():
            if value is not None:
                yield owner, name, value
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                yield owner, name, value


def _holder(owner: nn.Module, name: str) -> dict[str, Any]:
    return owner._buffers if name in owner._buffers else vars(owner)


def _version(buffer: torch.Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version
