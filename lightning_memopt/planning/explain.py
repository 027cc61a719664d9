"""Say what each step from the plain loop to a plan saves, and what it costs."""

from collections.abc import Mapping

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.planning.search import Evaluation
from lightning_memopt.planning.space import Choice


def explain(choice: Choice, evaluated: Mapping[Choice, Evaluation]) -> tuple[str, ...]:
    """The way to ``choice`` over those of the ``evaluated`` that it has all savings of, one sentence a step.

    Example: ``"selective checkpointing: -11.20 GiB for +4% time"``.
    """
    if choice not in evaluated:
        return ()
    # Other fractions of the activations are no steps on the way to one.
    passed = [other for other in evaluated if other.techniques.kept is None]
    chain = [choice]
    while True:
        below = [other for other in passed if chain[-1].adds_to(other)]
        if not below:
            break
        # The nearest: what has itself the most of the others below it.
        chain.append(max(below, key=lambda other: sum(other.adds_to(third) for third in below)))
    chain.reverse()
    return tuple(_step(chain[i], chain[i + 1], evaluated) for i in range(len(chain) - 1))


def _step(before: Choice, after: Choice, evaluated: Mapping[Choice, Evaluation]) -> str:
    words = " and ".join(after.techniques.names(before.techniques).values())
    saved = evaluated[before].peak_bytes - evaluated[after].peak_bytes
    slower = evaluated[after].total_seconds / evaluated[before].total_seconds - 1
    sign = "-" if saved >= 0 else "+"
    return f"{words}: {sign}{format_bytes(abs(saved))} for {slower:+.0%} time"
