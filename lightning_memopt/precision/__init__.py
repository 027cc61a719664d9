"""Precision plugins for `Trainer(plugins=[...])`."""
