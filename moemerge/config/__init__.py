"""The merge config: its schema, how it is read, and its problems with their places."""
