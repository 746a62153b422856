"""Decide a merge: from configs, headers and a few rows to every byte of the output."""
