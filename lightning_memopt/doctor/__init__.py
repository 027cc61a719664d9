"""``lightning-memopt doctor``: what this machine is, what it can do, and how fast."""
