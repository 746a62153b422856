"""Dense model types that a repository's own code runs, read as types that transformers knows, without that code."""
