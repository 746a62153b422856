"""Checkpoints on disk: headers, indexes, shards, and moving bytes between them. Knows nothing of experts."""
