"""What a choice will hold, from the traces of others: enough to leave most choices untraced."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_memopt.memory.report import TimelinePoint
from lightning_memopt.planning.space import Choice, Layout, Techniques
from lightning_memopt.planning.stages import count_micro_batches
from lightning_memopt.planning.trace import StepTrace

_STATE = ("parameters", "gradients", "optimizer_state")
_SWITCHES = ("checkpointing", "micro_batch", "chunked_loss", "in_backward", "offload", "low_bit")

_ABOUT, _NEARLY = 1.1, 1.03
"""An estimate so many times the budget is clearly above it: where nothing was traced on that layout, and where."""


class Estimates:
    """Bytes of choices without traces of their own.

    A rank holds its share of the state (parameters, gradients, what the optimizer keeps) and, beside it, what the
    step makes. The share follows from the layout. What the step makes is much the same on every layout with as many
    tensor parallel ranks, so that one trace tells of all of them; and what two techniques save together is much what
    each of them saves.

    Args:
        plain: The trace of a whole replica, with nothing more switched on than ``base``.
        base: What is on in any case.
        samples: In a batch of one device.
        blocks: Names of the modules that hold blocks. In these, a loss in chunks changes nothing.
    """

    def __init__(self, plain: StepTrace, base: Techniques, samples: int, blocks: Sequence[str]) -> None:
        most = {name: max(point.by_category[name] for point in plain.points) for name in _STATE}
        self._parameters = most["parameters"]
        self._gradients = most["gradients"]
        self._optimizer_state = most["optimizer_state"]
        self._base = base
        self._samples = samples
        self._made: dict[tuple[int, Techniques], int] = {}
        self._error: dict[Layout, int] = {}
        in_blocks = [point for point in plain.points if any(point.module.startswith(f"{name}.") for name in blocks)]
        self._made_in_blocks = max(map(_made_of, in_blocks), default=None)

    def least(self, choice: Choice) -> int:
        """What ``choice`` holds for certain.

        An even share is the least of what any rank has, be the split uneven or some of the model not split at all.
        """
        layout, techniques = choice.layout, choice.techniques
        if layout.offloads:
            return 0
        # ZeRO 1 and 2 gather all parameters for the forward and the backward; 16 bits are the least of what is whole.
        gathered = self._parameters // 2 if layout.gathers_all else 0
        summed = self._summed_gradients(choice)
        gradients = 0 if techniques.in_backward or summed else self._gradients // _ways(choice)
        return gathered + summed // 2 + gradients + (self._parameters + self._state(techniques)) // _ways(choice)

    def learn(self, choice: Choice, by_category: Mapping[str, int]) -> None:
        """Take down what a trace of ``choice`` showed at its peak."""
        layout = choice.layout
        if layout.sizes.pipeline > 1:
            return
        gathered = self._parameters if layout.gathers_all else 0
        made = sum(size for name, size in by_category.items() if name not in _STATE) - gathered
        usual = self._made.setdefault((layout.sizes.tensor, choice.techniques), made)
        error = sum(by_category.values()) - self._held(choice) - usual
        # Errors differ: gradients of the step before are held at one choice's peak and not at another's. The least of
        # them leaves too few untraced rather than too many.
        self._error[layout] = min(error, self._error.get(layout, error))

    def exceeds(self, choice: Choice, budget_bytes: int) -> bool | None:
        """Whether ``choice`` holds clearly more than a budget; ``None`` where nothing like it was traced."""
        tensor, techniques = choice.layout.sizes.tensor, choice.techniques
        made = self._made_by(tensor, techniques)
        if made is None:
            return None
        if choice.layout.sizes.pipeline > 1:
            # The first stage has its part of each of as many micro-batches as there are stages.
            made //= count_micro_batches(self._samples, choice.layout.sizes.pipeline)
        is_near = choice.layout in self._error and techniques.micro_batch is None
        estimate = self._held(choice) + made + self._error.get(choice.layout, 0)
        return estimate > budget_bytes * (_NEARLY if is_near else _ABOUT)

    def fits(self, choice: Choice, budget_bytes: int) -> bool:
        """Whether ``choice`` is estimated to hold no more than a budget."""
        return self.exceeds(choice, int(budget_bytes / _ABOUT)) is False

    def _made_by(self, tensor: int, techniques: Techniques) -> int | None:
        known = self._made.get((tensor, techniques))
        if known is not None:
            return known
        if techniques.micro_batch is not None:
            whole = self._made_by(tensor, replace(techniques, micro_batch=None))
            return None if whole is None else whole * techniques.micro_batch // self._samples
        plain = replace(self._base, precision=techniques.precision)
        if techniques == replace(plain, chunked_loss=True) and tensor == 1:
            return self._made_in_blocks
        changed = [name for name in _SWITCHES if getattr(techniques, name) != getattr(plain, name)]
        without = self._made.get((tensor, plain))
        if without is None or len(changed) < 2:
            return None
        alone = [self._made_by(tensor, replace(plain, **{name: getattr(techniques, name)})) for name in changed]
        if any(made is None for made in alone):
            return None
        return max(0, without + sum(made - without for made in alone if made is not None))

    def _held(self, choice: Choice) -> int:
        """Its share of the state while the backward begins, when only replicas have gradients, in their buckets."""
        if choice.layout.offloads:
            return 0
        gathered = self._parameters if choice.layout.gathers_all else 0
        buckets = self._gradients if choice.layout.strategy == "memopt_ddp" else 0
        gradients = max(buckets, self._summed_gradients(choice))
        return gathered + gradients + (self._parameters + self._state(choice.techniques)) // _ways(choice)

    def _summed_gradients(self, choice: Choice) -> int:
        """Gradients that micro-batches add up, whole where they are reduced only once a step."""
        if choice.layout.sizes.pipeline > 1:
            return self._gradients // (choice.layout.sizes.pipeline * choice.layout.sizes.tensor)
        if choice.techniques.micro_batch is None:
            return 0
        is_sharded = choice.layout.strategy == "memopt_zero2"
        return self._gradients // (_ways(choice) if is_sharded else choice.layout.sizes.tensor)

    def _state(self, techniques: Techniques) -> int:
        return self._optimizer_state // 4 if techniques.low_bit else self._optimizer_state  # 8 bits of 32


def _made_of(point: TimelinePoint) -> int:
    return sum(size for name, size in point.by_category.items() if name not in _STATE)


def _ways(choice: Choice) -> int:
    sizes = choice.layout.sizes
    return sizes.shard * sizes.tensor * sizes.pipeline
