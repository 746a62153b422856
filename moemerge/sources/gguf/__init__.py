"""Dense models in GGUF files, read as if they were stored by transformers."""
