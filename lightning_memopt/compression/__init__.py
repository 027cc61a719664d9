"""Prune, quantize, save and judge a module as plain functions. No Lightning import."""
