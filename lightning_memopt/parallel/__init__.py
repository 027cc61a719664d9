"""Parallelism as plain functions on an ``nn.Module``; no Lightning here."""
