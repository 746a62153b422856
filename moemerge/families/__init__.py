"""Output families, and the choice of one that holds what was asked for and is right in as many engines as can be."""
