"""What needs no PyTorch, under other Pythons: `python -m tests.support.pythons .cache/pythons INTERPRETER...`.

Each gets an environment with everything but PyTorch, which has a build without CUDA for few of them. There all modules
are compiled and imported, merges write the same bytes as here, and the tests that need no PyTorch are run.
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.models import make_model, write_config

ROOT = Path(__file__).parents[2]
PIP = ("-m", "pip", "install", "-q", "--disable-pip-version-check")
NOT_THERE = {"accelerate", "torch"}
FOR_TESTS = ("gguf", "hypothesis", "pytest", "pytest-socket")
# Without the fixtures that all tests share: these make models.
TESTS = (
    "tests/config/test_config.py",
    "tests/checkpoint/test_staging.py",
    "tests/export/test_ollama.py",
    "tests/model_card",
)
IMPORTS = f"""
import importlib, pkgutil, moemerge
done, left = 0, 0
for module in pkgutil.walk_packages(moemerge.__path__, "moemerge."):
    if module.name == "moemerge.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as problem:
        if problem.name not in {{"llama_cpp", *{sorted(NOT_THERE)}}}:
            raise
        left += 1
    else:
        done += 1
print(f"{{done}} modules imported, {{left}} need what is not there;", end=" ")
"""


def make_inputs(folder: Path) -> list[Path]:
    """Models in a folder, one of them pickled, and configs of merges that PyTorch has no part in."""
    names = ("base", "fox", "code", "pickled")
    base, *experts = (make_model(folder / name, seed, tuned_from=0) for seed, name in enumerate(names))
    tensors = experts[-1] / "model.safetensors"
    torch.save(load_file(tensors), tensors.with_name("pytorch_model.bin"))
    tensors.unlink()
    return [
        write_config(folder / "random.yaml", base, experts, prompts=False),
        write_config(folder / "embedded.yaml", base, experts, gate_mode="cheap_embed", dtype="bfloat16"),
        write_config(folder / "averaged.yaml", base, experts, prompts=False, shared_weights="average"),
    ]


def environment(python: str, folder: Path) -> Path:
    """An environment's interpreter. It has the versions of constraints.txt, or its newest where it has not all of these."""
    found = folder / "bin" / "python"
    if not found.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    wanted = [each for each in requires("moemerge") or () if "extra ==" not in each]
    wanted = [each for each in wanted if re.split(r"\W", each)[0] not in NOT_THERE] + [*FOR_TESTS]
    exact = ["-c", str(ROOT / "constraints.txt")]
    if subprocess.run([found, *PIP, *exact, *wanted], check=False, capture_output=True).returncode:
        subprocess.run([found, *PIP, *wanted], check=True)
    subprocess.run([found, *PIP, "--no-deps", "-e", ROOT], check=True)
    return found


def merge(python: Path | str, configs: list[Path], folder: Path) -> None:
    """Plan, merge, verify, inspect and export each config; any warning of Python's is an error."""
    moemerge = [python, "-W", "error", "-m", "moemerge"]
    for config in configs:
        out = folder / config.stem
        commands: tuple[list[str | Path], ...] = (
            ["plan", config],
            [config, out, "-q"],
            ["verify", out, "--against", config],
            ["inspect", out, "--values"],
            ["gguf", out, folder / f"{config.stem}.gguf", "-q"],
        )
        for arguments in commands:
            subprocess.run([*moemerge, *arguments], check=True, cwd=ROOT, capture_output=True)


def files_in(folder: Path) -> list[Path]:
    """Paths of its files, from the folder."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def main(folder: Path, *pythons: str) -> None:
    """Run everything under each interpreter.

    Raises:
        CalledProcessError: a command failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    configs, here = make_inputs(folder / "models"), folder / "here"
    merge(sys.executable, configs, here)
    for interpreter in pythons:
        version = subprocess.run([interpreter, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]
        python, there = environment(interpreter, ROOT / f".venv-python{version}"), folder / version
        print(f"Python {version}:", end=" ", flush=True)
        cached = {**os.environ, "PYTHONPYCACHEPREFIX": str(there / "compiled")}
        subprocess.run(
            [python, "-W", "error", "-m", "compileall", "-q", "moemerge", "tests"], check=True, cwd=ROOT, env=cached
        )
        subprocess.run([python, "-W", "error", "-c", IMPORTS], check=True, cwd=ROOT)
        merge(python, configs, there / "out")
        names = files_in(here)
        _, different, missing = filecmp.cmpfiles(here, there / "out", map(str, names), shallow=False)
        if different or missing or files_in(there / "out") != names:
            sys.exit(f"not the same files as here: {different + missing or files_in(there / 'out')}")
        print(f"{len(names)} files of {len(configs)} merges equal;", end=" ", flush=True)
        subprocess.run([python, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", *TESTS], check=True, cwd=ROOT)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *sys.argv[2:])
