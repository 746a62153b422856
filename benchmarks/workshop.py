"""The folder that benchmarks work in: models, configs and outputs are made here, and nothing else is touched."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Run, run
from prompts import prompts

HERE = Path(__file__).parent
MOEMERGE = [sys.executable, "-m", "moemerge"]
# In bfloat16: a model, and its FFNs, which are what one more expert adds to a merge.
GIGABYTES = {"tiny": (0.001, 0.0001), "slim": (0.8, 0.42), "1b": (2.2, 1.53), "7b": (14.5, 11.3)}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SPARE_GIGABYTES = 1
BUFFER_BYTES = 2**20
Command = Sequence[str | Path]


class NoRoomError(Exception):
    """The disk is too full for a benchmark."""


class Workshop:
    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self._real: Path | None = None

    def models(self, shape: str, experts: int, dtype: str = "bf16", *, sparse: bool = False) -> Path:
        """A folder with so many models, of which the base is the first expert, as in most merges.

        There is one such folder of real models at a time; sparse ones take no room.
        """
        folder = self.folder / f"{experts}x{shape}-{'sparse' if sparse else dtype}"
        if not folder.exists():
            if self._real:
                shutil.rmtree(self._real)
                self._real = None
            if not sparse:
                self.need(
                    experts * GIGABYTES[shape][0] * (2 if dtype == "fp32" else 1),
                    f"making {experts} x {shape} in {dtype}",
                )
                self._real = folder
            command: list[str | Path] = [
                sys.executable,
                HERE / "make_models.py",
                folder,
                "--shape",
                shape,
                "--experts",
                str(experts - 1),
            ]
            say(run([*command, "--dtype", dtype, *["--sparse"] * sparse]).output.strip())
        return folder

    def config(self, models: Path, experts: int, mode: str, dtype: str = "bf16") -> Path:
        """A merge config, in JSON, which is YAML; 40 prompts in all where the mode reads any."""
        path = self.folder / f"{models.name}-{mode}-{experts}-{dtype}.yaml"
        folders = [models / "base", *(models / f"expert{number}" for number in range(experts - 1))]
        chosen: list[dict[str, Any]] = [{"source_model": str(folder)} for folder in folders]
        if mode != "random":
            for number, expert in enumerate(chosen):
                expert["positive_prompts"] = prompts(number, 40 // experts)
        config = {"base_model": str(folders[0]), "gate_mode": mode, "dtype": DTYPES[dtype], "experts": chosen}
        path.write_text(json.dumps(config, indent=1))
        return path

    def ranges(self, config: Path) -> Path:
        path = config.with_suffix(".json")
        run([sys.executable, HERE / "ranges.py", config, path])
        return path

    def raw_copy(self, ranges: Path, *, fsync: bool) -> Command:
        return [sys.executable, HERE / "raw_copy.py", ranges, self.out, *["--fsync"] * fsync]

    def merge(self, config: Path, *options: str) -> Command:
        return [*MOEMERGE, config, self.out, "--device", "cpu", *options]

    def rounds(self, ways: Mapping[str, Command], sources: Path, repeat: int) -> dict[str, list[Run]]:
        """Each way `repeat` times, in turns: a busy moment of the machine meets all of them.

        Before each run the output of the run before is removed, the disk has nothing left to write, and `sources` are
        read once, so that they are in the page cache as far as there is room.
        """
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for number in range(repeat):
            for name, command in ways.items():
                runs[name].append(self.once(command, sources))
                say(f"round {number + 1}: {name}: {runs[name][-1].seconds:.2f} s")
        return runs

    def once(self, command: Command, sources: Path | None) -> Run:
        try:
            os.sync()
            if sources:
                warm(sources)
            return run(command)
        finally:
            shutil.rmtree(self.out, ignore_errors=True)

    def need(self, gigabytes: float, what: str) -> None:
        """Refuse to fill the disk.

        Raises:
            NoRoomError: it has too little room for so much.
        """
        os.sync()  # what was removed is free only now
        free = shutil.disk_usage(self.folder).free / 1e9
        if free < gigabytes + SPARE_GIGABYTES:
            raise NoRoomError(f"{what} needs {gigabytes:.0f} GB of disk and {SPARE_GIGABYTES} to spare, has {free:.0f}")


def merged_gigabytes(shape: str, experts: int) -> float:
    model, ffns = GIGABYTES[shape]
    return model + (experts - 1) * ffns


def warm(sources: Path) -> None:
    buffer = bytearray(BUFFER_BYTES)
    for path in sources.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
