"""Resolve a model reference to its `config.json` and the table of its tensors; no tensor bytes are read."""
