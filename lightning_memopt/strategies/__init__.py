"""Lightning strategies: arguments, hooks and state dicts over ``lightning_memopt.parallel``."""
