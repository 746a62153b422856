"""How routers get their first weights: one file per way, one pass over the base model for all that need it."""
