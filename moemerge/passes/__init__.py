"""A model run one decoder layer at a time, by transformers' own classes: never more of it in memory than a layer."""
