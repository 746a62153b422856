"""Random damage to what moemerge reads: `python -m tests.support.fuzz --seconds 180 --seed 0 [--only headers]`.

A case is read or refused: any exception but a MoemergeError fails, and so does a refusal that takes more than 2 s of the
processor, 300 MB, or 4 kB of words. What safetensors itself does not read must not be read either. The same seed gives
the same cases; of one that fails, the input is kept and named.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from moemerge import plan_merge
from moemerge.checkpoint.header import read_header
from moemerge.config.loading import load_config, parse_config
from moemerge.errors import MoemergeError
from moemerge.model_card.metadata import read_licence
from tests.support.families import DENSE
from tests.support.models import PROMPTS, make_model, write_config

SECONDS, MEGABYTES, MESSAGE_BYTES = 2.0, 300, 4000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FAMILIES = tuple(
    name
    for name in (
        "llama",
        "llama, tied, llama3 rope",
        "mistral, window",
        "phi3, longrope",
        "qwen2, mixed windows",
        "qwen3",
        "granite",
        "gemma4_text",
    )
    if DENSE[name][0] in CONFIG_MAPPING  # not all in transformers 4
)
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -0.0, 1e-60, 1e39, 1e400, float("nan"), "", " ", "x", "\x1b[31mred",
    "\x00", "\ud83c", "é" * 50, "x" * 100_000, "../../etc/passwd", "model.safetensors", "silu", [], [[]], [1] * 100_000, {}, {"a": {"b": [None]}},
    {"__float__": "inf"}, [["x"] * 30] * 30,
]  # fmt: skip
SNIPPETS = [
    b"&a ", b"*a", b"<<: *a\n", b"!!bool x", b"!!timestamp x", b"!!python/name:os.system ", b"!!binary x", b"!!set {", b"? ", b"- ", b": ",
    b"[" * 60, b"{" * 60, b"'", b'"', b"|\n", b">-\n", b"\t", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"\x00", b"\\ud83c", b"---\n", b"...\n",
    b"%YAML 9\n", b"2024-13-45", b"0x", b"1e999", b"9" * 5000, b"\x1b[2J", b"#", b"~",
]  # fmt: skip


def strange(rng: random.Random) -> Any:
    return rng.choice(STRANGE)


def damaged(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """The same value with something strange in it, somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        way = rng.random()
        if way < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.25:
            return value | {str(strange(rng))[:2000]: strange(rng)}
        return value | {key: damaged(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], damaged(rng, value[place], depth + 1), *value[place + rng.randrange(2) :]]
    return strange(rng)


def bitten(rng: random.Random, data: bytes) -> bytes:
    """The same bytes, cut, repeated or with others between them."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 4, 40, 400)))
        middle = rng.choice(
            (b"", rng.randbytes(rng.choice((1, 3))), rng.choice(SNIPPETS), data[start:end] * rng.choice((2, 50)))
        )
        data = data[:start] + middle + data[end:]
    return data


def as_json(rng: random.Random, value: Any) -> bytes:
    """A damaged JSON text of a value."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = damaged(rng, value)
    text = json.dumps(value).encode()
    return bitten(rng, text) if rng.random() < 0.2 else text


class Fuzz:
    """Models that are damaged in copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trios: dict[str, list[Path]] = {}
        self.case = root / "case"

    def trio(self, name: str) -> list[Path]:
        """A base and two experts of a family."""
        if name not in self.trios:
            model_type, keys = DENSE[name]
            folder = self.root / name.replace(", ", "-").replace(" ", "-")
            self.trios[name] = [
                make_model(folder / own, seed, model_type, tuned_from=0, **keys)
                for seed, own in enumerate(("base", "one", "two"))
            ]
        return self.trios[name]

    def copied(self, rng: random.Random, name: str) -> tuple[list[Path], Path]:
        """Links to a trio, one of them a copy that may be damaged."""
        models = self.trio(name)
        which = rng.randrange(3)
        copy = Path(shutil.copytree(models[which], self.case / "model"))
        return [*models[:which], copy, *models[which + 1 :]], copy

    def plan(self, models: list[Path], **keys: Any) -> None:
        config = write_config(self.case / "c.yaml", models[0], models[1:], prompts=False, **keys)
        plan_merge(load_config(config, allow_identical_experts=True))

    def headers(self, rng: random.Random) -> None:
        source = (self.trio("llama")[0] / SINGLE).read_bytes()
        size = int.from_bytes(source[:8], "little")
        header = json.loads(source[8 : 8 + size])
        header = dict(rng.sample(list(header.items()), rng.choice((1, 3, len(header))))) | {
            "__metadata__": {"format": "pt"}
        }
        text, data = as_json(rng, header), source[8 + size :]
        if rng.random() < 0.3:  # whole, with the data that it speaks of
            save_file({"a": torch.zeros(rng.randrange(3), 2), "b": torch.zeros(4)}, self.case / "small")
            whole = bitten(rng, (self.case / "small").read_bytes())
        else:
            length = len(text) if rng.random() < 0.8 else rng.choice((0, 1, 2**40, 2**64 - 1))
            whole = length.to_bytes(8, "little") + text + data[: rng.choice((0, 64, len(data)))]
        path = self.case / "m.safetensors"
        path.write_bytes(whole)
        tensors = read_header(path)
        try:
            with safe_open(path, "pt") as opened:
                assert set(opened.keys()) == set(tensors)
                assert all(
                    tuple(opened.get_slice(name).get_shape()) == tensor.shape for name, tensor in tensors.items()
                )
        except SafetensorError as error:
            raise AssertionError(f"read, but safetensors says {error}") from error

    def yamls(self, rng: random.Random) -> None:
        document: Any = {
            "base_model": "base", "gate_mode": "ridge", "dtype": "bf16", "experts_per_token": 2, "moe_layers": "2-",
            "router": {"lambda": 0.1, "scale": 2, "load_prior": [1, 1]}, "shared_weights": {"method": "ties", "density": 0.4},
            "experts": [{"source_model": name, "positive_prompts": list(PROMPTS[n]), "residual_scale": 1.5} for n, name in enumerate("ab")],
        }  # fmt: skip
        if rng.random() < 0.5:
            text = bitten(rng, yaml.safe_dump(document, sort_keys=False).encode())
        else:
            text = as_json(rng, document)
        (self.case / "c.yaml").write_bytes(text)
        config = load_config(self.case / "c.yaml")
        assert parse_config(config.text).model_dump() == config.model_dump()

    def configs(self, rng: random.Random) -> None:
        models, copy = self.copied(rng, rng.choice(FAMILIES))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_bytes(as_json(rng, config))
        self.plan(models, gate_mode=rng.choice(("random", "delta")))

    def indexes(self, rng: random.Random) -> None:
        models, copy = self.copied(rng, "llama")
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(read_header(copy / SINGLE), "one.safetensors"),
        }
        (copy / SINGLE).rename(copy / "one.safetensors")
        (copy / INDEX).write_bytes(as_json(rng, index))
        self.plan(models)

    def tokenizers(self, rng: random.Random) -> None:
        base, one, two = self.trio("llama")
        copy = Path(shutil.copytree(base, self.case / "model"))
        name = rng.choice(("tokenizer_config.json", "generation_config.json", "tokenizer.json"))
        (copy / name).write_bytes(as_json(rng, json.loads((copy / name).read_text())))
        self.plan([copy, one, two])

    def cards(self, rng: random.Random) -> None:
        text = b"---\nlicense: apache-2.0\nbase_model: [a/b]\ntags:\n- x\n---\n# A model\n"
        (self.case / "README.md").write_bytes(bitten(rng, text))
        read_licence(self.case)

    def adapters(self, rng: random.Random) -> None:
        base, one, two = self.trio("llama")
        module = "base_model.model.model.layers.1.mlp.up_proj"
        tensors = {f"{module}.lora_A.weight": torch.zeros(4, 32), f"{module}.lora_B.weight": torch.zeros(48, 4)}
        config = {
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "bias": "none", "alpha_pattern": {"x": 4},
            "base_model_name_or_path": "acme/base", "use_rslora": False, "task_type": "CAUSAL_LM",
        }  # fmt: skip
        adapter = self.case / "adapter"
        adapter.mkdir()
        if rng.random() < 0.5:
            name = rng.choice(
                (f"{module}.lora_A", "lora_A.weight", f"{module}.weight", "x\x1b", "base_model.model.score.weight")
            )
            tensors = dict(rng.sample(list(tensors.items()), 1)) | {name: torch.zeros(rng.randrange(3), 32)}
        save_file(tensors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_bytes(
            as_json(rng, config) if rng.random() < 0.7 else json.dumps(config).encode()
        )
        self.plan([base, Path(f"{one}+{adapter}"), two])


TARGETS: dict[str, Callable[[Fuzz, random.Random], None]] = {
    "headers": Fuzz.headers,
    "yamls": Fuzz.yamls,
    "configs": Fuzz.configs,
    "indexes": Fuzz.indexes,
    "tokenizers": Fuzz.tokenizers,
    "cards": Fuzz.cards,
    "adapters": Fuzz.adapters,
}


def memory(what: str) -> int:
    """Resident megabytes: now (`VmRSS`) or at the peak since it was asked to forget (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith(what))


def run(fuzz: Fuzz, target: str, seed: str) -> tuple[str, str]:
    """Try one case; gives what became of it, and what is wrong about that."""
    shutil.rmtree(fuzz.case, ignore_errors=True)
    fuzz.case.mkdir()
    rng = random.Random(seed)
    fuzz.trio("llama")
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    end, wrong = "read", ""
    try:
        TARGETS[target](fuzz, rng)
    except MoemergeError as error:
        end = "refused"
        if len(str(error).encode()) > MESSAGE_BYTES:
            wrong = f"a message of {len(str(error).encode())} bytes"
    except Exception:  # noqa: BLE001  what is looked for
        wrong = traceback.format_exc()
    seconds, grown = time.process_time() - start, memory("VmHWM") - before
    if seconds > SECONDS or grown > MEGABYTES:
        wrong = wrong or f"{seconds:.1f} s, {grown} MB"
    return end, wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    options = parser.parse_args(arguments)
    counts: dict[str, int] = {}
    faults: list[str] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        fuzz = Fuzz(Path(root))
        for name in FAMILIES:
            fuzz.trio(name)
        targets = [options.only] if options.only else list(TARGETS)
        for number in range(options.cases):
            if time.monotonic() - start > options.seconds or len(faults) > 20:
                break
            target = targets[number % len(targets)]
            seed = f"{options.seed} {number}"
            end, wrong = run(fuzz, target, seed)
            counts[f"{target} {end}"] = counts.get(f"{target} {end}", 0) + 1
            if wrong:
                kept = Path(tempfile.mkdtemp(prefix=f"moemerge-fuzz-{target}-"))
                shutil.copytree(fuzz.case, kept / "case")
                faults.append(f"{target}, seed {seed!r}, kept in {kept}:\n{wrong}")
    print(json.dumps(counts, indent=1))
    print("\n".join(faults) or "no faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
