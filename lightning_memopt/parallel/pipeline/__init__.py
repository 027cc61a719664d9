"""Pipeline parallelism over an unmodified step: every rank runs the user's own step, whole, on each micro-batch.

A rank holds the parameters of its stages. Whatever needs the others is computed on *stubs*, tensors without data
(:mod:`~lightning_memopt.parallel.pipeline.stubs`), which costs no memory and tells what a stage must be sent: each
argument of its first block that is a stub.
"""
