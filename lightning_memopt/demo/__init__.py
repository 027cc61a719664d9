"""The demo: one small GPT trained plainly and with the techniques on, and what each run cost."""
