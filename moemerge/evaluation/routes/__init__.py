"""Trace which token goes to which expert in each layer of a mixture."""
