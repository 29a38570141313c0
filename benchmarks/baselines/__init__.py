"""Optimizers to compare with that no maintained package has."""
