"""A dense model of one expert of a mixture, or of all of them."""
