"""A merge config begun from the names of models: what they are for, which is the base, what measured well."""
