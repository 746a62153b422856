"""Which mixtures are multimodal, for engines that have other classes for these; text alone is computed of them too."""

import json
from pathlib import Path


def has_towers(model: Path) -> bool:
    """Whether it has the towers of its base."""
    return "vision_config" in json.loads((model / "config.json").read_text())
