"""Names that all families give their tensors."""


def layer_prefix(layer: int) -> str:
    """The prefix of a decoder layer's tensors in a checkpoint, such as `model.layers.7.`."""
    return f"model.layers.{layer}."
