"""The divisors by which llama3's scaling of rotary positions slows each frequency, as GGUF files hold them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def llama3_factors(rope: Mapping[str, Any], width: int) -> NDArray[np.float32]:
    """Compute the divisors (width / 2,), rounded as llama.cpp's converter rounds them.

    Waves shorter than `original / high_freq_factor` stay, those longer than `original / low_freq_factor` are slowed by
    `factor`, and between them the divisor rises smoothly.

    Args:
        rope: the settings of rotary positions; those that are absent have Llama 3.1's values.
        width: the width of a head.
    """
    one = np.float32(1)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    # Each step is rounded to float32; numpy's own power in float32 is not the nearest number.
    powers = (float(rope.get("rope_theta", 10000.0)) ** exponents.astype(np.float64)).astype(np.float32)
    lengths = one / (one / powers) * np.float32(2 * math.pi)
    factor, low, high = (
        float(rope.get(key, default))
        for key, default in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    original = float(rope.get("original_max_position_embeddings", 8192))
    smooth = (one / lengths * np.float32(original) - np.float32(low)) / np.float32(high - low)
    between = one / ((one - smooth) / np.float32(factor) + smooth)
    slowed = np.where(lengths > np.float32(original / low), np.float32(factor), between)
    return np.where(lengths < np.float32(original / high), one, slowed).astype(np.float32)
