"""Recipes that are tried without writing a model, and the best of them as a merge config."""
