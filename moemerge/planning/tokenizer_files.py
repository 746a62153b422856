"""Find the files that a merge copies from its base beside weights, and how transformers reads its tokenizer."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.copy import copy_file
from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.passes.proving import Entries
from moemerge.passes.tokens import code_references, listed, read_tokenizer_config
from moemerge.sources.gguf.opening import add_tokenizer
from moemerge.sources.model_folder import ModelFolder, fetch_files
from moemerge.sources.remote_weights import TEMPLATES

# Files beside the weights that are copied from the base byte for byte.
COPIED_FILES: Final = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tiktoken.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_VOCABULARIES: Final = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "tiktoken.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_SMALL_TABLES: Final = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_MADE: Final = ("tokenizer.json", TOKENIZER_CONFIG)
# Classes that read tokenizer.json as it is.
_AS_IT_IS: Final = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Model types for which transformers 5 takes another class all the same, and those for which it never does:
# MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS and TOKENIZER_MAPPING_NAMES in models/auto/tokenization_auto.py.
_RECLASSED: Final = frozenset(
    {"llava", "llava_next", "qwen2", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}
)
_BY_FILE: Final = frozenset({"mistral", "mixtral"})
# A repository's code, and a fix for Mistral's tokenizers that depends on model_type.
_EXCEPTIONS: Final = frozenset({"auto_map", "fix_mistral_regex"})
_CLASS: Final = re.compile(r"(\w+)\.\w+")
_IMPORT: Final = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)
# Names of vocabulary files in a tokenizer's code.
_VOCABULARY: Final = re.compile(r"[\"']([\w-][\w.-]*\.(?:tiktoken|model|txt|bpe|vocab))[\"']")
_MOST_CODE: Final = 2**20
_END_BYTES: Final = 1000


@dataclass(frozen=True)
class BaseFiles:
    """The files that are copied from a base beside weights."""

    base: ModelFolder
    copied: Mapping[str, Path]
    """Source files by their paths in the output."""
    tokenizer_config: Mapping[str, Any]
    notes: tuple[str, ...]
    reader_notes: tuple[str, ...]
    """Notes for users of the output."""
    edited: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of files that are written beside or instead of copies, since the output's vocabulary is another."""
    added: Entries | None = None
    """The tokens that the edited files have beside the base's; None where the tokenizer is a copy."""

    def made(self, model_type: str) -> tuple[str, ...]:
        """Names of tokenizer files that may have to be made, beside or instead of copies, to give the base's ids.

        Empty where tokenizer.json is read as it is under both the base's and the output's `model_type`: transformers
        4.57 always takes the class that its config names, and transformers 5 does with known exceptions.
        """
        named, types = self.tokenizer_config.get("tokenizer_class"), {model_type, self.base.stored_type}
        read_alike = (
            "tokenizer.json" in self.copied
            and "tekken.json" not in self.copied  # which mistral-common may read instead
            and _EXCEPTIONS.isdisjoint(self.tokenizer_config)
            and ((named in _AS_IT_IS and _RECLASSED.isdisjoint(types)) or (named and types <= _BY_FILE))
        )
        has_one = bool(_vocabularies(self.copied)) or named not in (None, *_AS_IT_IS)
        return () if read_alike or not has_one else _MADE

    def write(self, folder: Path, made: Mapping[str, bytes]) -> None:
        """Write the files into a folder; those in `made`, contents by name, take the place of copies.

        Raises:
            OSError: they cannot be written.
        """
        for name, path in self.copied.items():
            if name not in made:
                (folder / name).parent.mkdir(exist_ok=True)
                copy_file(path, folder / name)
        for name, content in made.items():
            (folder / name).write_bytes(content)

    @property
    def respelled(self) -> Mapping[str, bytes]:
        """A `tokenizer_config.json` that transformers 4 also reads, by name; empty where the base's own serves."""
        both = respelled_tokenizer(self.tokenizer_config)
        return {} if both == self.tokenizer_config else {TOKENIZER_CONFIG: json.dumps(both, indent=2).encode() + b"\n"}


def find_base_files(
    base: ModelFolder, announce: Callable[[str], None], *, needed: bool, place: str = "base_model"
) -> BaseFiles:
    """Find the files to copy from a base, including chat templates and files that its tokenizer's config names.

    Args:
        base: the model.
        announce: called with a line about each step that takes long.
        needed: whether a missing tokenizer is an error.
        place: the model in notes.

    Raises:
        IncompatibleError: there is no tokenizer.
        SourceError: the Hub does not give a file.
        CheckpointError: a file is a link that leads elsewhere.
    """
    problem = add_tokenizer(base)
    config = read_tokenizer_config(base.folder)
    versions = config.get("fast_tokenizer_files")
    versioned = [name for name in versions if isinstance(name, str)] if isinstance(versions, list) else []
    wanted = [*COPIED_FILES, *(name for name in versioned if re.fullmatch(r"tokenizer\.[\w.-]+\.json", name))]
    wanted += template_names(base.folder)
    copied = {name: path for name in wanted if (path := base.file(name))}
    notes: list[str] = []
    reader_notes: list[str] = []
    if references := code_references(config):
        code, note = _find_code(base, references, announce)
        copied |= {name: path for name, path in code.items() if name not in copied}
        reader_notes.append(note)
    notes += _damaged(copied, place)
    vocabularies = _vocabularies(copied)
    if needed and not vocabularies:
        add = f"its tokenizer {problem}" if problem else "add its tokenizer.json"
        raise IncompatibleError(
            "base_model: has no tokenizer to read the prompts with.",
            [f"{add}, or remove the prompts and choose gate_mode random"],
        )
    if not vocabularies:
        why = f": its own {problem}" if problem else ""
        notes.append(f"{place}: has no tokenizer.json and no tokenizer.model to copy{why}")
    elif "tokenizer.json" not in vocabularies:
        notes.append(
            f"{place}: has no tokenizer.json; one is made of {', '.join(vocabularies)} as transformers converts it, "
            "if it can, and compared with the base's tokenizer before anything is written"
        )
    return BaseFiles(base, copied, config, tuple(notes), tuple(reader_notes))


def _damaged(copied: Mapping[str, Path], place: str) -> Iterator[str]:
    """Say which of the copied files of a model no program can load."""
    if "tokenizer.json" in copied and not _looks_whole(copied["tokenizer.json"]):
        yield f"{place}: its tokenizer.json is empty or cut off: no program can load it, nor the output's"
    for name in _SMALL_TABLES:
        if name in copied:
            try:
                read_json(copied[name])
            except CheckpointError as error:
                yield f"{place}: its {name} is copied, but {str(error).partition(': ')[2].rstrip('.')}"


def _looks_whole(path: Path) -> bool:
    """Whether a file begins and ends as a JSON object does."""
    with path.open("rb") as file:
        first = file.read(_END_BYTES)
        file.seek(max(path.stat().st_size - _END_BYTES, 0))
        return first.lstrip().startswith(b"{") and file.read(_END_BYTES).rstrip().endswith(b"}")


def template_names(folder: Path) -> list[str]:
    """List the chat templates of a model's folder beside the default one, by their paths in it."""
    return sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("[!.]*.jinja"))


def _vocabularies(names: Collection[str]) -> list[str]:
    return [name for name in _VOCABULARIES if name in names]


def respelled_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite a `tokenizer_config.json` that transformers 5 saved, so that transformers 4 also reads it.

    Observed with transformers 4.57.6 and 5.23.
    """
    found = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def notes_for_4(config: Mapping[str, Any]) -> list[str]:
    """Notes on what transformers 4 cannot read in a tokenizer's config that transformers 5 saved."""
    both = respelled_tokenizer(config)
    lines = []
    if both.get("tokenizer_class") != config.get("tokenizer_class"):
        lines.append(f'"tokenizer_class": "{both["tokenizer_class"]}"')
    if "additional_special_tokens" in both.keys() - config.keys():
        lines.append('"additional_special_tokens" as the name of "extra_special_tokens"')
    if not lines:
        return []
    return [
        "transformers 4 does not read this tokenizer_config.json, which transformers 5 has saved: for both, it needs "
        f"{' and '.join(lines)}, which `moemerge repair` writes"
    ]


def _find_code(
    base: ModelFolder, references: Iterable[str], announce: Callable[[str], None]
) -> tuple[dict[str, Path], str]:
    """Find the files of a tokenizer's code, its imports and the vocabularies that it names; and a note on them."""
    own = [match[1] for reference in references if (match := _CLASS.fullmatch(reference))]
    foreign = [reference for reference in references if not _CLASS.fullmatch(reference)]
    found: dict[str, Path] = {}
    lost: list[str] = []
    vocabularies: set[str] = set()
    wanted = dict.fromkeys(f"{module}.py" for module in own)
    while wanted:
        files = fetch_files(base, list(wanted), announce)
        lost += [name for name in wanted if name not in files]
        found |= files
        texts = [_read_code(path) for path in files.values()]
        vocabularies.update(name for text in texts for name in _VOCABULARY.findall(text))
        imported = (f"{module}.py" for text in texts for module in _IMPORT.findall(text))
        wanted = dict.fromkeys(name for name in imported if name not in found and name not in lost)
    note = f"the tokenizer is code ({listed(found) or 'none of it here'}), copied and never run by moemerge: "
    note += "AutoTokenizer runs it with trust_remote_code=True alone"
    note += f"; not copied, since it is of another repository: {listed(foreign)}" if foreign else ""
    note += f"; the base has no {listed(lost)}" if lost else ""
    return found | fetch_files(base, sorted(vocabularies), announce), note


def _read_code(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_MOST_CODE)
