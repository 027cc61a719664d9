"""The program behind `lightning-memopt demo`."""
