"""The merge config: its schema, how it is read, and what is wrong with it, with places."""
