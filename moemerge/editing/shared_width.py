"""How wide the shared experts of an edited mixture are: some families count them in widths of the others."""

from moemerge.checkpoint.header import TensorInfo
from moemerge.families.family import MoeFamily


def shared_width(family: MoeFamily, down: TensorInfo, expert_width: int) -> int | None:
    """The number of neurons that are stored for all shared experts of a layer; None if the family cannot hold them.

    Args:
        family: the mixture's family.
        down: the shared experts' down projection (hidden, neuron) as it is stored.
        expert_width: the number of neurons of each other expert.
    """
    width, shared = down.shape[-1], family.shared
    if shared is None or shared.width == "any":
        return width
    if shared.width == "one expert":
        return expert_width if width <= expert_width else None
    return -(-width // expert_width) * expert_width
