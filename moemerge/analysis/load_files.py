"""Load of experts as files that serving tools place experts by, on several GPUs.

Both hold numbers of tokens, as a balancer of expert parallelism (EPLB) counts them. What tools read is taken from their
source; no engine was run with these files.

- A `.npy` file is the matrix (layer with a router, expert) that DeepSeek's `rebalance_experts` takes as `weight`
  (deepseek-ai/EPLB, `eplb.py` at 5791971), as does vLLM's (`vllm/distributed/eplb/policy`). vLLM itself reads no file
  of load: its `EPLBConfig` has no option for one (`vllm/config/parallel.py` at 00193b8).
- A `.json` file is for SGLang's `--init-expert-location`, which takes `logical_count` from it
  (`python/sglang/srt/eplb/expert_location.py` at 01fec5c): a row for every decoder layer, since its classes give the
  number of those. Layers without a router have zeros. SGLang places experts only for classes that define
  `get_model_config_for_expert_location`.
"""

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moemerge.analysis.figures import TextFigures
from moemerge.checkpoint.copy import write_failure
from moemerge.checkpoint.disk import drafted
from moemerge.errors import RefusedError


def load_counts(figures: TextFigures) -> NDArray[np.int64]:
    """Number of tokens that choose each expert (layer with a router, expert)."""
    counts: NDArray[np.int64] = np.rint(np.tensordot(np.array(figures.tokens), figures.load, 1)).astype(np.int64)
    return counts


def check_load(path: Path) -> None:
    """Refuse a path that no load can be written to.

    Raises:
        RefusedError: the name has an ending that no tool is known by, there is no such folder, or something is there.
    """
    if path.suffix not in {".json", ".npy"}:
        raise RefusedError(f"{path}: expected a name that ends in .json, for SGLang, or in .npy, for EPLB.")
    if not path.resolve().parent.is_dir():
        raise RefusedError(f"{path}: there is no such folder.")
    if os.path.lexists(path):
        raise RefusedError(f"{path}: is there already, and is not replaced. Choose another name.")


def write_load(path: Path, figures: TextFigures, layers: int) -> None:
    """Write the load of experts; the ending of the name, `.json` or `.npy`, says for which tools.

    Args:
        path: the file to write.
        figures: what was measured.
        layers: number of all decoder layers.

    Raises:
        RefusedError: the name has another ending, or nothing can be written there.
        OutputError: the file cannot be written.
    """
    check_load(path)
    counts = load_counts(figures)
    rows = np.zeros((layers, counts.shape[1]), np.int64)
    rows[list(figures.layers)] = counts
    facts = {"logical_count": rows.tolist(), "experts": figures.names, "tokens": sum(figures.tokens)}
    try:
        with drafted(path) as draft, draft.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, counts)
            else:
                file.write(f"{json.dumps(facts)}\n".encode())
    except OSError as error:
        raise write_failure(path, error) from error
