"""Lightning callbacks: arguments, hooks and logging over `techniques/`."""
