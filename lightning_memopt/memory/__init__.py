"""Measure memory: tracker, timeline, report, pictures. Plain torch."""
