"""Make the first weights of routers: one file per method, and one pass over the base model for all that need it."""
