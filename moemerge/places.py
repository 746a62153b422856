"""Places in a document, such as `experts[1].source_model`."""

Place = tuple[int | str, ...]
"""The keys and indices that lead to a value."""


def address(place: Place) -> str:
    """Write a place as messages do: `experts[1].source_model`; long keys are cut."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step:.60}" for step in place).lstrip(".")
