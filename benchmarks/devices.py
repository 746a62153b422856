"""What several devices gain: the time of passes on `cpu,cpu` against that on `cpu`, by one thread each.

    OMP_NUM_THREADS=1 python benchmarks/devices.py MODELS TEXTS --markdown

MODELS has the folders `base` and those of its fine-tunes, TEXTS a NAME.calib.txt for each of these. Routers of a merge
of all are made by `hidden`, and the losses of the merge computed on the same texts. One device and two take turns; the
shortest time of each counts. The machine needs a free core for each device.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from routers import show

from moemerge import load_config, merge, plan_merge
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.passes.compute_dtype import Compute, find_compute
from moemerge.routers.initialisation import init_routers
from moemerge.routers.request import PassOptions
from moemerge.texts.documents import find_files, read_documents

DEVICES = ("cpu", "cpu,cpu")
Work = Callable[[str], list[float]]


def written(folder: Path, models: Path, texts: Path, tokens: int) -> Path:
    """Write the config of a merge of all fine-tunes."""
    names = sorted(path.name for path in models.iterdir() if path.name != "base" and path.is_dir())
    experts = [
        {"name": name, "source_model": str(models / name), "positive_texts": str(texts / f"{name}.calib.txt")}
        for name in names
    ]
    document = {
        "base_model": str(models / "base"),
        "gate_mode": "hidden",
        "router": {"tokens_per_expert": tokens},
        "experts": experts,
    }
    (folder / "merge.yaml").write_text(json.dumps(document))  # which is YAML, too
    return folder / "merge.yaml"


def works(folder: Path, models: Path, texts: Path, tokens: int) -> dict[str, Work]:
    """Everything that is timed, as functions from the names of devices to numbers that have to be equal."""
    plan = plan_merge(load_config(written(folder, models, texts, tokens)))
    merge(plan, folder / "out")
    mixture = open_mixture(folder / "out")
    documents = {
        name: read_documents(find_files([str(texts / f"{name}.calib.txt")], "TEXTS")) for name in mixture.experts
    }
    windows = Texts.cut(mixture, documents, tokens, 512).windows

    def routers(devices: str) -> list[float]:
        options = PassOptions(device=devices, compute_dtype="float32")
        made = init_routers(plan.router_request, options, seed=0, progress=lambda *_: None)
        return [float(byte) for layer in made.rows.values() for byte in layer]

    def losses(devices: str) -> list[float]:
        compute: Compute = find_compute(devices, "float32", ())
        return run_model(mixture.runnable, windows, compute).tolist()

    return {"routers by `hidden`": routers, "losses of the mixture": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    heads = ["", *(f"{devices}, s" for devices in DEVICES), "ratio", "largest difference"]
    show(heads, options)
    if options.markdown:
        show(["---"] * len(heads), options)
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(Path(folder), options.models, options.texts, options.tokens).items():
            taken: dict[str, list[float]] = {devices: [] for devices in DEVICES}
            found = {}
            for _ in range(options.repeat):
                for devices in DEVICES:
                    start = perf_counter()
                    found[devices] = work(devices)
                    taken[devices].append(perf_counter() - start)
            one, two = (min(taken[devices]) for devices in DEVICES)
            apart = max(abs(a - b) for a, b in zip(*found.values(), strict=True))
            show([name, f"{one:.1f}", f"{two:.1f}", f"{two / one:.2f}", f"{apart:.2g}"], options)


if __name__ == "__main__":
    main()
