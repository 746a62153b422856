"""Checkpoints on disk: headers, indexes, shards, and copying bytes between them. Knows nothing of experts."""
