"""Recompute no more than the budget asks for: choose by operator what the fastest plan keeps.

A search looks at checkpointing that keeps nothing, and that keeps the products. Between them the policy ``"budget"``
keeps the operators with the most time per byte, a knapsack (:mod:`lightning_memopt.techniques.checkpointing.budget`).
Its capacity is what is looked for here.
"""

from collections.abc import Callable
from dataclasses import replace

from lightning_memopt.planning.search import Evaluation, Found, Refused
from lightning_memopt.planning.space import Choice

_TENTHS = range(1, 10)


def keep_what_fits(found: Found, evaluate: Callable[[Choice], Evaluation], budget_bytes: int) -> Found:
    """Of the plan that is the fastest so far, the one that keeps the most activations that fit.

    Memory grows with what is kept, so that three or four traces tell of the nine fractions.

    Args:
        found: What a search found.
        evaluate: The truth; raises :class:`~lightning_memopt.planning.search.Refused`.
        budget_bytes: What fits.

    Returns:
        The same with what was looked at, if the fastest plan recomputes anything.
    """
    fastest = next(iter(found.fitting), None)
    if fastest is None or fastest.techniques.checkpointing == "none":
        return found
    fitting, too_large = dict(found.fitting), dict(found.too_large)
    fewest, most = 0, _TENTHS.stop - 1
    while fewest < most:
        tenths = (fewest + most + 1) // 2
        choice = replace(fastest, techniques=replace(fastest.techniques, checkpointing="budget", kept=tenths / 10))
        try:
            evaluation = evaluate(choice)
        except Refused:
            return found
        if evaluation.peak_bytes <= budget_bytes:
            fewest, fitting[choice] = tenths, evaluation
        else:
            most, too_large[choice] = tenths - 1, evaluation
    ranked = sorted(fitting.items(), key=lambda item: item[1].total_seconds)
    return Found(dict(ranked), too_large, found.refused)
