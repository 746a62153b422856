"""Compare the files of a merged folder with its plan, beside the tensors in them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.compare import compare_files
from moemerge.checkpoint.header import TensorInfo, read_metadata
from moemerge.checkpoint.index import SAFETENSORS_INDEX, read_json
from moemerge.checkpoint.journal import differences as changed_keys
from moemerge.checkpoint.shards import METADATA
from moemerge.config.loading import load_config
from moemerge.config.local_paths import absolute_paths
from moemerge.config.schema import CARD, CONFIG_COPY
from moemerge.errors import CheckpointError, ConfigError, RefusedError
from moemerge.file_kinds import Kind, what_is
from moemerge.model_card.card import compare_card, is_edit_card
from moemerge.planning.plan import MergePlan
from moemerge.planning.tokenizer_files import COPIED_FILES, respelled_tokenizer, template_names
from moemerge.planning.tokenizer_proof import prove_tokenizer
from moemerge.sources.model_folder import ModelFolder

# Keys that only decide on the output family, which is compared itself.
_DECIDED: Final = {"architecture", "engine"}
ABSENT: Final = "absent"
"""Stands for the value of a file or key that is not there."""
# Files that some reader loads instead of the model, on top of it, or as a reason to read it in another way: adapters,
# weights in other formats, Mistral's own layout, code, settings of quantisation and of processors.
_READ_INSTEAD: Final = re.compile(
    r"adapter_(config\.json|model\..+)|.+\.(bin|bin\.index\.json|pt|pth|ckpt|h5|msgpack|gguf|onnx|py)|consolidated.*|"
    r"params\.json|(\w*_)?quant\w*\.json|(pre)?processor_config\.json|modules\.json|config_sentence_transformers\.json"
)
_GGUF: Final = ".gguf"
_OF_5_ALONE: Final = "words that transformers 5 alone reads"
# A key that no merge writes, and `save_pretrained` always does.
_SAVED_BY: Final = "transformers_version"


@dataclass(frozen=True, slots=True)
class Difference:
    """Something in a merged checkpoint that is not as planned."""

    what: str
    """The name of a tensor, a file, or a key of `config.json`."""
    expected: str
    found: str


def compare_files_beside(plan: MergePlan, model: ModelFolder) -> tuple[int, list[Difference]]:
    """Compare all files but weights; returns the number of copied files that are equal, and the differences.

    Raises:
        CheckpointError: a file cannot be read.
    """
    equal, differences = _compare_other_files(plan, model)
    return equal, [
        *_compare_config(plan, model),
        *_repeated_keys(model),
        *differences,
        *_compare_config_copy(plan, model),
        *(Difference(CARD, expected, found) for expected, found in compare_card(model.folder, plan)),
        *_foreign_files(plan, model),
    ]


def notable(model: ModelFolder, differences: Sequence[Difference]) -> tuple[list[Difference], list[str]]:
    """Split differences into those that matter and notes on files that damage nothing.

    Notes are GGUF files, and files that `save_pretrained` of transformers leaves out. A card or a copy of the config
    that is not the merge's is a difference all the same, but a card of an edit in place is only noted.

    Args:
        model: the merged folder.
        differences: the differences of its files.
    """
    notes, harmless = [], set[Difference]()
    for difference in differences:
        if difference.what.endswith(_GGUF) and what_is(model.folder / difference.what) is Kind.GGUF:
            harmless.add(difference)
            notes.append(
                f"{difference.what}: a GGUF file, which some readers load instead of the weights beside it. It is not "
                "compared: write it again where they have changed since"
            )
        if difference.what == CARD and is_edit_card(model.folder):
            harmless.add(difference)
        if difference.found == _OF_5_ALONE:
            harmless.add(difference)
            notes.append(
                f"{difference.what}: transformers 4 does not read it, for transformers 5 has saved it; else it is as "
                "planned. `moemerge repair` writes it for both"
            )
    if any(difference.what == CARD for difference in harmless):
        notes.append(f"{CARD}: was written by an edit in place, and is not compared")
    if isinstance(version := model.config.get(_SAVED_BY), str):
        dropped = [d for d in differences if d.what in {CARD, CONFIG_COPY} and d.found == ABSENT]
        harmless.update(dropped, [d for d in differences if d.what == f"config.json: {_SAVED_BY}"])
        lost = f", which keeps no {' and no '.join(d.what for d in dropped)}" if dropped else ""
        notes.append(f"config.json: says that transformers {version:.20} has saved the model again{lost}")
    return [difference for difference in differences if difference not in harmless], notes


def _compare_config(plan: MergePlan, model: ModelFolder) -> list[Difference]:
    def texts(config: dict[str, Any]) -> dict[str, str]:
        return {f"config.json: {key}": json.dumps(value, sort_keys=True) for key, value in config.items()}

    return compare_entries(texts(plan.output_config), texts(model.whole or model.config))


def _compare_other_files(plan: MergePlan, model: ModelFolder) -> tuple[int, list[Difference]]:
    """Compare the tokenizer and the like; returns how many are equal. An extra file changes how the model reads text.

    A file made of the base's tokenizer is made again for this; another transformers may make other bytes.
    """
    differences: list[Difference] = []
    made: Mapping[str, bytes] = {}
    try:
        made = prove_tokenizer(plan.base_files, plan.output_config, in_process=False).files
    except RefusedError as error:
        differences.append(Difference("tokenizer", "the base's ids", str(error)))
    equal = 0
    for name in dict.fromkeys([*COPIED_FILES, *plan.copied_files, *made, *template_names(model.folder)]):
        source, file = plan.copied_files.get(name), model.file(name)
        expected = f"the bytes of {source}" if source else ABSENT
        respelled = plan.base_files.respelled.get(name)
        if respelled and made.get(name) == respelled:
            expected = f"what {source} says, in words that transformers 4 reads, too"
        elif name in made and made[name] == plan.base_files.edited.get(name):
            expected = f"what `tokenizer: {plan.config.vocabulary}` makes of the base's files"
        elif name in made:
            expected = f"what transformers {version('transformers')} makes of the tokenizer in {plan.base_folder}"
        if not file:
            found = ABSENT
        elif respelled and (is_for_both := _is_respelled(file, made.get(name, respelled))) is not None:
            found = expected if is_for_both or name not in made else _OF_5_ALONE
        elif name in made:
            found = (
                expected if file.read_bytes() == made[name] else "other bytes: changed, or made by another transformers"
            )
        else:
            found = (compare_files(source, file) or expected) if source else "a file"
        if found != expected:
            differences.append(Difference(name, expected, found))
        else:
            equal += file is not None
    return equal, differences


def _is_respelled(file: Path, respelled: bytes) -> bool | None:
    """Whether a tokenizer's config is the one that transformers 4 reads, too; None where it says something else."""
    try:
        found = read_json(file)
    except CheckpointError:
        return None
    both = respelled_tokenizer(found)
    return found == both if both == json.loads(respelled) else None


def compare_index(model: ModelFolder, tensors: dict[str, TensorInfo]) -> list[Difference]:
    """Compare the index beyond its weight map, which agrees with the headers once they are read."""
    names = {tensor.path.name for tensor in tensors.values()}
    differences = [
        Difference(path.name, f"metadata {json.dumps(METADATA)}", json.dumps(found)[:200])
        for path in sorted({tensor.path for tensor in tensors.values() if isinstance(tensor.path, Path)})
        if path.suffix == ".safetensors" and (found := read_metadata(path)) != METADATA
    ]
    differences += [
        Difference(path.name, "no weights that the index does not name", "a file that no reader loads")
        for path in sorted(model.folder.glob("*.safetensors"))
        if path.name not in names
    ]
    if index := model.file(SAFETENSORS_INDEX):
        metadata = read_json(index).get("metadata")
        announced = metadata.get("total_size") if isinstance(metadata, dict) else None
        stored = sum(tensor.nbytes for tensor in tensors.values())
        if announced != stored:
            differences.append(Difference(SAFETENSORS_INDEX, f"total_size {stored}", f"total_size {announced}"))
    elif len(names) > 1:
        differences.append(Difference(SAFETENSORS_INDEX, f"an index of {len(names)} files", ABSENT))
    return differences


def _repeated_keys(model: ModelFolder) -> list[Difference]:
    """Find keys that a file has twice: readers differ in which they take."""
    repeated: list[tuple[str, str]] = []
    for name in ("config.json", SAFETENSORS_INDEX):
        keys: list[str] = []
        if path := model.file(name):
            read_json(path, keys.append)
        repeated += [(name, key) for key in keys]
    return [Difference(f"{name}: {key}", "once", "twice") for name, key in repeated]


def _compare_config_copy(plan: MergePlan, model: ModelFolder) -> Iterator[Difference]:
    """Compare the copy of the config that the folder keeps for evaluation and tuning."""
    path = model.file(CONFIG_COPY)
    if path is None:
        yield Difference(CONFIG_COPY, "the config", ABSENT)
        return
    try:
        copy = load_config(path, allow_identical_experts=True)
    except ConfigError as error:
        yield Difference(CONFIG_COPY, "the config", str(error))
        return
    given, kept = (
        absolute_paths(config.model_dump(mode="json", by_alias=True, exclude=_DECIDED))
        for config in (plan.config, copy)
    )
    for key in changed_keys(given, kept):
        yield Difference(f"{CONFIG_COPY}: {key}", "as in the config", "another value")


def _foreign_files(plan: MergePlan, model: ModelFolder) -> list[Difference]:
    names = [path.relative_to(model.folder).as_posix() for path in sorted(model.folder.rglob("*"))]
    return [
        Difference(name, ABSENT, "a file that changes what some reader loads")
        for name in names
        if _READ_INSTEAD.fullmatch(name.rpartition("/")[2]) and name not in plan.copied_files and name[0] != "."
    ]


def compare_entries(expected: dict[str, str], found: dict[str, str]) -> list[Difference]:
    """List the entries in which two tables of texts differ."""
    return [
        Difference(what, expected.get(what, ABSENT), found.get(what, ABSENT))
        for what in dict.fromkeys([*expected, *found])
        if expected.get(what) != found.get(what)
    ]
