"""One step of `analysis.py` in a process of its own: make the checkpoint, read it plainly, or analyse it.

    python benchmarks/analysis_process.py {make,read,analyse} FOLDER --shape 8x7b --layers 2

It prints its seconds as JSON.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from make_models import block, write_tensor

from moemerge.analysis.matching import Matching, choose_matching
from moemerge.analysis.projection import THREADS
from moemerge.analysis.weights import analyze_weights
from moemerge.checkpoint.header import build_header
from moemerge.checkpoint.index import SAFETENSORS_INDEX, build_index
from moemerge.sources.stored_mixtures import read_mixture

# Hidden size, width, and layers of the whole model
SHAPES = {"tiny": (64, 96, 8), "8x7b": (4096, 14336, 32)}
EXPERTS = 8
BUFFER_BYTES = 2**20


def make(folder: Path, shape: str, layers: int) -> dict[str, float]:
    """Experts and routers of Mixtral's names in bfloat16, a shard for each layer; nothing else is compared."""
    hidden, width, _ = SHAPES[shape]
    folder.mkdir()
    weight_map: dict[str, str] = {}
    numbers, total = block("BF16"), 0
    for layer in range(layers):
        module = f"model.layers.{layer}.block_sparse_moe."
        sizes = {f"{module}gate.weight": (EXPERTS, hidden)}
        for expert in range(EXPERTS):
            roles = {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}
            sizes |= {f"{module}experts.{expert}.{role}.weight": size for role, size in roles.items()}
        table = [(name, "BF16", size, 2 * int(np.prod(size))) for name, size in sizes.items()]
        file_name = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        with (folder / file_name).open("wb", buffering=0) as file:
            file.write(build_header(table, {"format": "pt"}))
            for name, size in sizes.items():
                write_tensor(file.fileno(), name, "BF16", size, numbers)
            os.fsync(file.fileno())
        weight_map |= dict.fromkeys(sizes, file_name)
        total += sum(nbytes for *_, nbytes in table)
    (folder / SAFETENSORS_INDEX).write_text(build_index(weight_map, total))
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": width, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return {"bytes": total}


def read(folder: Path) -> dict[str, float]:
    """Every byte of the shards into a buffer, each file in as many parts as the analysis has threads."""

    def read_part(path: Path, start: int, nbytes: int) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while nbytes:
                nbytes -= file.readinto(buffer[: min(nbytes, BUFFER_BYTES)])

    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(THREADS) as pool:
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            edges = [size * part // THREADS for part in range(THREADS + 1)]
            parts = [(path, begin, end - begin) for begin, end in pairwise(edges)]
            list(pool.map(lambda part: read_part(*part), parts))
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def analyse(folder: Path, shape: str) -> dict[str, float]:
    """Analyse with the neurons of the last layer matched, as many as are matched of the whole model."""
    hidden, width, all_layers = SHAPES[shape]
    mixture = read_mixture(str(folder), lambda _: None)[1]
    chosen = choose_matching(range(all_layers), EXPERTS, width, hidden)
    matched = Matching(chosen.neurons, frozenset(mixture.moe_layers[-1:]))
    marks: list[tuple[float, float]] = []

    def mark(_done: int = 0, _total: int = 0) -> None:
        marks.append((time.perf_counter(), time.process_time()))

    mark()
    analyze_weights(mixture, progress=mark, matching=matched)
    layers = np.diff(np.array(marks), axis=0)
    return {
        "plain": float(layers[:-1, 0].mean()), "plain_cpu": float(layers[:-1, 1].mean()),
        "matched": float(layers[-1, 0]), "matched_cpu": float(layers[-1, 1]),
        "neurons": chosen.neurons, "matched_layers": len(chosen.layers), "all_layers": all_layers,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("make", "read", "analyse"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8x7b")
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    if options.step == "make":
        result = make(options.folder, options.shape, options.layers)
    else:
        result = read(options.folder) if options.step == "read" else analyse(options.folder, options.shape)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
