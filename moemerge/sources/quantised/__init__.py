"""Quantised weights as the plain matrices that their own libraries make of them: a module for each method."""
