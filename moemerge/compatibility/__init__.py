"""Check that models may be merged, measure how far apart they are, and find what a merge loses of them."""
