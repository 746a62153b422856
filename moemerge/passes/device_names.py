"""Names of devices, which are checked before torch is imported."""

import re
from typing import Final

DEVICES: Final = "auto, cpu, cuda, cuda:N, xpu, xpu:N, mps"
"""The names, as a message lists them."""


def is_device(name: str) -> bool:
    """Whether a device may have this name; `auto` is the best one."""
    return re.fullmatch(r"auto|cpu|mps(:0)?|(cuda|xpu)(:\d+)?", name) is not None
