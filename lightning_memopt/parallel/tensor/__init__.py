"""Tensor parallelism: find a plan, apply it to a module in place on a one-dimensional mesh, undo it."""
