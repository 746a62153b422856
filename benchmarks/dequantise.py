"""How fast one thread dequantises a model's weights: GB of bfloat16 per second, beside plain copies of as many bytes.

    python benchmarks/dequantise.py FOLDER --gb 1 --repeat 5

For each way in which weights are quantised, a file with one such weight is written into FOLDER, and read as a merge
reads it into a file of bfloat16; then everything is removed again. Files stay in the page cache, so the figures are the
processor's and not the disk's; the best of all repetitions counts. `cores` is as in `cast.py`.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cast import copy, make, read_and_write, seconds

from moemerge.checkpoint.bands import band_chunks
from moemerge.checkpoint.copy import write_all
from moemerge.checkpoint.header import TensorInfo, build_header, read_header
from moemerge.checkpoint.pieces import Piece
from moemerge.dtypes import BITS, HeaderDType
from moemerge.sources.quantised.table import dequantised

WIDTH = 4096
Tensors = Mapping[str, tuple[HeaderDType, tuple[int, ...]]]
INTS: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel"}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"config_groups": {"group_0": {"weights": weights}}}
    return {"quant_method": "compressed-tensors", "format": form, **groups}


def kinds(rows: int) -> dict[str, tuple[dict[str, Any], Tensors]]:
    """Settings and stored tensors of a matrix (rows, `WIDTH`), by the name of what it is stored as."""
    groups = (rows, WIDTH // 128)
    gptq: Tensors = {
        "qweight": ("I32", (WIDTH // 8, rows)),
        "qzeros": ("I32", (WIDTH // 128, rows // 8)),
        "scales": ("F16", (WIDTH // 128, rows)),
    }
    return {
        "FP8, blocks": (
            {"quant_method": "fp8"},
            {"weight": ("F8_E4M3", (rows, WIDTH)), "weight_scale_inv": ("F32", (rows // 128, WIDTH // 128))},
        ),
        "int8, rows": (
            compressed("int-quantized", **INTS),
            {"weight": ("I8", (rows, WIDTH)), "weight_scale": ("BF16", (rows, 1))},
        ),
        "int4, groups": (
            compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128),
            {"weight_packed": ("I32", (rows, WIDTH // 8)), "weight_scale": ("BF16", groups)},
        ),
        "GPTQ": ({"quant_method": "gptq", "bits": 4}, gptq),
    }


def write(path: Path, settings: dict[str, Any], tensors: Tensors) -> TensorInfo:
    """Write a file of quantised numbers, all scales of one size; returns the matrix as it is read."""
    rng = np.random.default_rng(0)
    table = [
        (f"x.{name}", dtype, shape, int(np.prod(shape)) * BITS[dtype] // 8) for name, (dtype, shape) in tensors.items()
    ]
    scale = {"F32": np.float32(0.01).tobytes(), "BF16": b"\x24\x3c", "F16": np.float16(0.01).tobytes()}
    with path.open("wb") as file:
        file.write(build_header(table, {}))
        for _, dtype, _, nbytes in table:
            if dtype in scale:
                file.write(scale[dtype] * (nbytes // len(scale[dtype])))
            else:  # no NaN in FP8
                file.write(rng.integers(0, 127, nbytes, np.uint8).tobytes())
    return dequantised({"quantization_config": settings, "dtype": "bfloat16"}, read_header(path))["x.weight"]


def dequantise(tensor: TensorInfo, target: int) -> None:
    for chunk in band_chunks((Piece(tensor, "BF16"),), [""]):
        write_all(target, chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    rows = max(1, int(options.gb * 1e9) // 2 // WIDTH // 128) * 128
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        plain = make(Path(folder, "plain"), "BF16", 2 * rows * WIDTH)
        made = {name: write(Path(folder, name), *kind) for name, kind in kinds(rows).items()}
        ways = {"copied by the kernel": (copy, plain), "read and written": (read_and_write, plain)}
        ways |= {name: (dequantise, tensor) for name, tensor in made.items()}
        runs = [  # in turns, so that a busy moment of the machine meets all ways
            {name: seconds(way, tensor, Path(folder, "out")) for name, (way, tensor) in ways.items()}
            for _ in range(options.repeat)
        ]
    best = {name: min(run[name] for run in runs) for name in ways}
    for name, (elapsed, cpu) in best.items():
        ratio = best["copied by the kernel"][0] / elapsed
        rate = plain.nbytes / elapsed / 1e9
        print(f"{name:20} {rate:5.2f} GB/s  {cpu / elapsed:.2f} cores  {ratio:.2f} of the kernel's copy")


if __name__ == "__main__":
    main()
