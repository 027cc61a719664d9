"""Run one optimizer step, on real or on fake tensors, and report its memory."""
