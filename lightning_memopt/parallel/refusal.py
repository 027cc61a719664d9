"""The error that says that a step of the user's does what a strategy cannot split, told apart from the user's own."""


class StepRefused(ValueError):
    """Raised in the midst of the user's step, alike on all ranks that share it."""
