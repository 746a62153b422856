"""A mixture changed, or taken apart: experts added, left out, replaced, split, pruned."""
