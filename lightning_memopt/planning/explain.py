"""Say what each step from the plain loop to a plan saves, and what it costs."""

from collections.abc import Mapping

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.planning.search import Evaluation
from lightning_memopt.planning.space import Choice


def explain(choice: Choice, evaluated: Mapping[Choice, Evaluation]) -> tuple[str, ...]:
    """The way to ``choice`` over those of the ``evaluated`` that it has all savings of, one sentence a step.

    It begins with the layout that usually takes the least time, which is replicas where there are several devices.

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
    replicas = [
        other
        for other in passed
        if other.layout.usual_slowdown < choice.layout.usual_slowdown
        and chain[-1].techniques.needs_no_more_than(other.techniques)
    ]
    if replicas:
        chain.append(min(replicas, key=lambda other: other.layout.usual_slowdown))
    chain.reverse()
    return tuple(_step(chain[i], chain[i + 1], evaluated) for i in range(len(chain) - 1))


def _step(before: Choice, after: Choice, evaluated: Mapping[Choice, Evaluation]) -> str:
    layout = [str(after.layout)] if after.layout != before.layout else []
    words = " and ".join([*layout, *after.techniques.names(before.techniques).values()])
    saved = evaluated[before].peak_bytes - evaluated[after].peak_bytes
    slower = evaluated[after].total_seconds / evaluated[before].total_seconds - 1
    sign = "-" if saved > 0 else "+" if saved < 0 else ""
    return f"{words}: {sign}{format_bytes(abs(saved))} for {slower:+.0%} time"
