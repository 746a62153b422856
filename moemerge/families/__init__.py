"""Output families and how one is chosen: exactly what was asked for, right in as many engines as can be."""
