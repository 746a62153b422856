"""How routers get their first weights: one file per method, one pass over the base model for all that need it."""
