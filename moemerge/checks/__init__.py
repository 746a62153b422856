"""Examine checkpoints: what one is, whether it holds what its plan says, and what transformers dropped of it."""
