"""Fewer experts: what each does on text, which of them stay, and what that costs."""
