"""From a model reference in the YAML to its `config.json` and the table of its tensors; no tensor bytes are read."""
