"""Checkpoint files and directories: written whole or not at all, read without the ranks that wrote them."""
