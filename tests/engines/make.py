"""Merge every case, and keep what transformers computes of it.

    python -m tests.engines.make FOLDER [--new]

With --new, only what the package's record lacks, in its present form, and what adds nothing to it. A folder for each case: `model`, `tokens.json`, and `expected.npz` with `logprobs` (sequence, position, vocab) of the
tokens, and `generated` (sequence, new token), what follows them.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
import yaml

from moemerge import load_config, merge, plan_merge
from tests.engines.cases import EXPERTS, LAYERS, TEXT_LENGTH, VOCAB, Case, tried
from tests.engines.record import recorded
from tests.engines.sources import make_source
from tests.engines.towers import has_towers
from tests.support.models import load, write_config
from tests.support.multimodal import load_multimodal

NEW_TOKENS: Final = 6
_DONE: Final = "expected.npz"


def main(root: Path, *, only_new: bool) -> None:
    """Make what is missing, or was made of other bytes; each kind's models once."""
    known = recorded() if only_new else set()
    for case, is_new in tried():
        form = case.form if is_new else None
        if (case.family, case.facts, form) not in known:
            _make(case, form, root / slug(case))
    for folder in (root / "sources").iterdir():
        shutil.rmtree(folder)


def slug(case: Case) -> str:
    """The case's name as that of a folder."""
    return str(case).replace(", ", "-").replace(" -> ", "--").replace(" ", "-").replace("[", "").replace("]", "")


def _make(case: Case, form: str | None, folder: Path) -> None:
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    _merge(case, made, _sources(folder.parent / "sources", case.kind))
    digest = _digest(made / "out")
    told = {
        "case": str(case),
        "reference": f"transformers {transformers.__version__}",
        "family": case.family,
        "facts": sorted(case.facts),
        "form": form,
        "digest": digest,
    }
    before = folder / "case.json"
    if before.exists() and json.loads(before.read_text())["digest"] == digest and (folder / _DONE).exists():
        shutil.rmtree(made)
        before.write_text(json.dumps(told))
        return
    shutil.rmtree(folder / "model", ignore_errors=True)
    for answer in folder.glob("*.answer.json"):
        answer.unlink()
    (made / "out").rename(folder / "model")
    shutil.rmtree(made)
    tokens = torch.randint(3, VOCAB, (2, TEXT_LENGTH), generator=torch.Generator().manual_seed(7))
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    np.savez(folder / _DONE, **_computed(folder / "model", tokens))
    before.write_text(json.dumps(told))
    sys.stdout.write(f"{case}\n")


def _digest(model: Path) -> str:
    files = sorted(path for path in model.iterdir() if path.suffix in {".json", ".safetensors"})
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def _sources(root: Path, kind: str) -> list[Path]:
    """A base, a shared expert and the others."""
    folder = root / kind.replace(" ", "-")
    found = [folder / str(seed) for seed in range(EXPERTS + 2)]
    if not folder.exists():
        for seed, path in enumerate(found):
            make_source(path, kind, seed)
    return found


def _merge(case: Case, folder: Path, sources: list[Path]) -> None:
    base, shared, *experts = sources
    folder.mkdir(parents=True)
    keys: dict[str, Any] = {"shared_experts": [{"source_model": str(shared)}]} if case.shared else {}
    if len(case.moe_layers) < LAYERS:
        keys["moe_layers"] = list(case.moe_layers)
    keys |= {"keep_vision": True} if case.vision else {"architecture": case.family}
    config = write_config(folder / "merge.yaml", base, experts, prompts=False, **keys)
    if case.has_absent:
        document = yaml.safe_load(config.read_text())
        document["experts"][-1]["layers"] = list(range(1, LAYERS))
        config.write_text(yaml.safe_dump(document))
    merge(plan_merge(load_config(config)), folder / "out")


@torch.no_grad()
def _computed(model: Path, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    loaded = load_multimodal(model) if has_towers(model) else load(model)
    ends = loaded.generation_config
    ends.eos_token_id = None
    generated = loaded.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    logits = loaded(tokens, use_cache=False).logits.double()
    return {"logprobs": logits.log_softmax(-1).numpy(), "generated": generated[:, tokens.shape[1] :].numpy()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), only_new="--new" in sys.argv)
