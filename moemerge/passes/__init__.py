"""Run a model one decoder layer at a time with transformers' own classes; one layer at most is in memory."""
