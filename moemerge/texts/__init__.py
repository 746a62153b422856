"""Documents and prompts, read from files."""
