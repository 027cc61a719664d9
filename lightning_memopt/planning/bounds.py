"""What a choice holds at least, known without a trace of it: enough to leave out what cannot fit."""

from dataclasses import dataclass

from lightning_memopt.planning.space import Choice
from lightning_memopt.planning.trace import StepTrace


@dataclass(frozen=True)
class StateBytes:
    """What one replica of a model holds from one step to the next, in bytes.

    Attributes:
        parameters: Its parameters.
        gradients: Their gradients, when the optimizer steps.
        optimizer_state: What the optimizer keeps.
    """

    parameters: int
    gradients: int
    optimizer_state: int

    @classmethod
    def of(cls, trace: StepTrace) -> "StateBytes":
        """Of the trace of a whole replica."""
        most = {
            name: max(point.by_category[name] for point in trace.points)
            for name in ("parameters", "gradients", "optimizer_state")
        }
        return cls(**most)

    def least(self, choice: Choice) -> int:
        """The least that a device holds under ``choice``: its share of the state, and what stays whole beside it.

        An even share is the least of what any rank has, be the split uneven or some of the model not split at all.
        """
        layout, techniques = choice.layout, choice.techniques
        if layout.offloads:
            return 0
        gradients = 0 if techniques.in_backward else self.gradients
        # 8 bits of 32, and no bound on other optimizers' states.
        state = self.optimizer_state // 4 if techniques.low_bit else self.optimizer_state
        ways = layout.sizes.shard * layout.sizes.tensor * layout.sizes.pipeline
        # ZeRO 1 and 2 gather all parameters for the forward and the backward, in 16 bits if they compute in them.
        gathered = self.parameters // 2 if layout.gathers_all else 0
        return gathered + (self.parameters + gradients + state) // ways
