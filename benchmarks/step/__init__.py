"""Whole training steps: every optimizer on every model, with their parts and their counts."""
