"""The model card of an edited mixture, or of a model that was taken out of one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.config.schema import CARD
from moemerge.model_card.metadata import licence_fields
from moemerge.model_card.template import render
from moemerge.model_card.usage import use_it
from moemerge.sources.reference import Reference

if TYPE_CHECKING:
    from moemerge.sources.model_folder import ModelFolder


@dataclass(frozen=True)
class EditCard:
    """What the card of a model says that was made of a mixture."""

    model_type: str
    what: str
    """The first paragraph: what the model is, and of which models it was made."""
    parameters: tuple[int, int]
    """Number of all parameters, and of those that a token passes through."""
    rows: Sequence[tuple[str, str]] = ()
    """Name and origin of each expert."""
    notes: Sequence[str] = ()
    text: str = ""
    """The config that says the same; empty where there is none."""
    tags: Sequence[str] = ("moe", "moemerge")


def write_edit_card(
    folder: Path, name: str, card: EditCard, sources: "Sequence[ModelFolder]", licence: str | None
) -> None:
    """Write `README.md` with the Hub's metadata into a folder.

    Args:
        folder: the folder.
        name: the model's name.
        card: what the card says.
        sources: the models that it was made of.
        licence: the model's licence, as the Hub calls it or `other NAME LINK`; None where it is not known.
    """
    from huggingface_hub.repocard_data import ModelCardData  # the rest of its cards takes long to import

    repos = list(dict.fromkeys(source.origin.repo for source in sources if isinstance(source.origin, Reference)))
    fields: dict[str, Any] = licence_fields(licence or "")
    data = ModelCardData(
        base_model=repos or None,
        base_model_relation="merge" if repos else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(card.tags),
        **fields,
    )
    fence = max(["```", *(f"{ticks}`" for ticks in re.findall(r"`{3,}", card.text))], key=len)
    body = render("edited", name=name, card=card, use=use_it(name, card.model_type, ()), fence=fence)
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8", newline="\n")
