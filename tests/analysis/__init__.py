"""Tests of `moemerge.analysis`."""
