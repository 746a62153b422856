"""Text that a model continues or answers, token by token, and the experts of its tokens."""
