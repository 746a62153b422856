"""The model card of a merged model: what it is made of, how it routes, how to run it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moemerge.chats import COUNTED_ROLES
from moemerge.config.config_copy import written_references
from moemerge.config.schema import CARD, CONFIG_COPY, Expert
from moemerge.errors import RefusedError
from moemerge.model_card.markdown import as_code, as_text
from moemerge.model_card.metadata import licence_fields, read_metadata, rewritten
from moemerge.model_card.template import render, render_block
from moemerge.model_card.usage import use_it
from moemerge.planning.models import references_of
from moemerge.planning.plan import MergePlan
from moemerge.sources.data_sets import SCHEME
from moemerge.sources.reference import Reference, parse_reference
from moemerge.texts.documents import hub_revisions

if TYPE_CHECKING:
    from moemerge.evaluation.figures import Estimate, Evaluation
    from moemerge.routers.report import RoutingReport

_TAGS: Final = ["moe", "merge", "frankenmoe", "moemerge"]
_SAMPLE_LENGTH: Final = 60
_CONFIGURATION: Final = "## Configuration"
_MADE_OF: Final = re.compile(r"^A \S+ of \d+ experts.*, made with moemerge: .*$", re.MULTILINE)
_EDITED: Final = re.compile(r"^A \S+ of \d+ experts, .*, edited with moemerge\..*$", re.MULTILINE)
_TRAINED_NORMS: Final = "The norms were trained by `moemerge tune` after the merge."


def write_card(
    folder: Path,
    name: str,
    plan: MergePlan,
    report: "RoutingReport",
    licence: str | None = None,
    *,
    text: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write `README.md` with the Hub's metadata into `folder`.

    Args:
        folder: the folder to write it into.
        name: the merged model's name.
        plan: the plan that it was made by.
        report: which experts take the tokens of which text.
        licence: the merged model's licence.
        text: the config as it is shown; None as it was written.
        notes: what to say of the merge beside the plan's notes.
    """
    values = _values(plan, plan.config.text if text is None else text, [*plan.family_notes, *notes])
    use = use_it(name, plan.shape.model_type, plan.right_in, sees=plan.shape.vision is not None)
    data_sets = hub_revisions([data.name for data in plan.data_sets])
    card = render("card", name=name, report=report, use=use, data_sets=data_sets, **values)
    _save(folder, plan, licence, card + "\n")


def write_metadata_card(folder: Path, plan: MergePlan, licence: str | None = None) -> None:
    """Write a `README.md` with the Hub's metadata alone, for readers that need nothing else."""
    _save(folder, plan, licence, "")


def _save(folder: Path, plan: MergePlan, licence: str | None, body: str) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    repos = _repositories(plan)
    data = ModelCardData(
        base_model=repos or None,
        base_model_relation="merge" if repos else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if plan.shape.vision else "text-generation",
        datasets=list(dict.fromkeys(data.repo for data in plan.data_sets)) or None,
        tags=_TAGS,
        **licence_fields(licence or ""),  # type: ignore[arg-type]  # some keys of many
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / CARD)


def is_edit_card(folder: Path) -> bool:
    """Whether a folder's model card is one that an edit wrote."""
    return _has_line(folder / CARD, _EDITED)


def is_foreign_card(folder: Path) -> bool:
    """Whether a folder has a model card that neither a merge nor an edit wrote."""
    path = folder / CARD
    return path.is_file() and not (_has_line(path, _EDITED) or _has_line(path, _MADE_OF))


def _has_line(path: Path, line: re.Pattern[str]) -> bool:
    return path.is_file() and line.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def compare_card(folder: Path, plan: MergePlan) -> list[tuple[str, str]]:
    """Find what a merged model's card lacks or says otherwise: the expected words, and those that are found.

    Titles, licences and measured figures are not compared, but all that follows from the plan.
    """
    path = folder / CARD
    if not path.is_file():
        return [("a model card", "absent")]
    text = path.read_text(encoding="utf-8", errors="replace")
    copy = folder / CONFIG_COPY
    config = copy.read_text(encoding="utf-8", errors="replace") if copy.is_file() else None
    expected = _facts(plan, config)
    lost = [(fact, "not in it") for fact in expected if fact not in text]
    try:
        named = read_metadata(path).get("base_model")
    except RefusedError as error:
        return [*lost, ("metadata in YAML", str(error))]
    repos = _repositories(plan)
    return lost if named == (repos or None) else [*lost, (f"base_model: {repos}", f"base_model: {named!r:.200}")]


def _repositories(plan: MergePlan) -> list[str]:
    """List the Hub repositories that the model is made of; sources in folders have none."""
    adapters = [parse_reference(adapter.reference) for source in plan.sources for adapter in source.adapters]
    origins = [*(source.origin for source in plan.sources), *adapters]
    return list(dict.fromkeys(origin.repo for origin in origins if isinstance(origin, Reference)))


def _facts(plan: MergePlan, config: str | None) -> list[str]:
    """Render the lines of a card that follow from the plan, and the block with a config's text where there is one."""
    values = _values(plan, config or "", plan.family_notes)
    texts = [render_block("card", block, **values) for block in ("what", "size", "experts", "warnings", "notes")]
    configuration = [] if config is None else [render_block("card", "configuration", **values)]
    return [line for text in texts for line in text.split("\n") if line] + configuration


def _values(plan: MergePlan, text: str, notes: Sequence[str]) -> dict[str, Any]:
    """Collect the values of the card's template that follow from the plan, the config's text and the notes."""
    config = plan.config
    named: list[tuple[str, Expert]] = [*zip(config.expert_names, config.experts, strict=True)]
    named += [("shared", expert) for expert in config.shared_experts]
    references = [reference for _, reference in references_of(config)]
    # As the config's text has them: a card says the same from whatever folder it is looked at.
    written = written_references(text)
    written = written if len(written) == len(references) else references  # a copy that is damaged, or another's
    base, *models = [_shown(reference, name, plan) for reference, name in zip(references, written, strict=True)]
    return {
        "plan": plan,
        "config": config,
        "base": base,
        "experts": [(name, model, _sample(expert)) for (name, expert), model in zip(named, models, strict=True)],
        "notes": notes,
        "text": text.rstrip(),
        # A prompt may hold a code fence of its own.
        "fence": max(["```", *(f"{ticks}`" for ticks in re.findall(r"`{3,}", text))], key=len),
    }


def read_card(folder: Path) -> str:
    """Read the text of a folder's model card, for an update.

    Raises:
        RefusedError: there is no model card, or it is not text in UTF-8.
    """
    path = folder / CARD
    if not path.is_file():
        raise RefusedError(f"{path}: there is no model card to update.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path}: is not text in UTF-8, so it cannot be updated. Save it as UTF-8.") from error


def update_evaluation(folder: Path, found: "Evaluation") -> None:
    """Put the results of an evaluation into a folder's model card, in place of older ones.

    Raises:
        RefusedError: there is no model card, or it is not text in UTF-8.
        OutputError: the card cannot be written.
    """
    text = read_card(folder)
    losses = loss_table("model", [domain.name for domain in found.domains], found.losses, found.mean_losses)
    section = render("evaluation", found=found, losses="\n".join(losses))
    with rewritten(folder / CARD) as draft:
        draft.write_text(with_section(text, "evaluation", section), encoding="utf-8")


def with_section(text: str, name: str, section: str) -> str:
    """Put a section between comments of this name into a model card's text, in place of an older one."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{opening}\n{section}\n{closing}"
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if start and end:
        return before + section + after
    if _CONFIGURATION in text:
        before, heading, after = text.rpartition(_CONFIGURATION)
        return f"{before}{section}\n\n{heading}{after}"
    return f"{text.rstrip()}\n\n{section}\n"


def without_section(text: str, name: str) -> str:
    """Remove the section between comments of this name from a model card's text."""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->\n")
    return before + after.removeprefix("\n") if start and end else text


def with_trained_norms(text: str) -> str:
    """Add to a model card's first paragraph, which says where norms come from, that they were trained since."""
    if _TRAINED_NORMS in text:
        return text
    return _MADE_OF.sub(lambda paragraph: f"{paragraph[0]} {_TRAINED_NORMS}", text, count=1)


def loss_table(
    head: str, domains: Sequence[str], losses: Mapping[str, Mapping[str, "Estimate"]], means: Mapping[str, float]
) -> list[str]:
    """Write a Markdown table with a row per entry: losses in nats per token by domain, intervals, and their mean."""
    lines = [f"| {head} | {' | '.join(map(as_text, domains))} | mean |", "|---" * (len(domains) + 2) + "|"]
    for row, found in losses.items():
        cells = [f"{found[name].value:.3f}{found[name].interval}" if name in found else "" for name in domains]
        lines.append(f"| {as_text(row)} | {' | '.join(cells)} | {f'{means[row]:.3f}' if row in means else ''} |")
    return lines


def _shown(reference: str, written: str, plan: MergePlan) -> str:
    """Show a source as the config's text names it, or as its repository and commit."""
    source = next((source for source in plan.sources if source.reference == reference), None)
    if (
        source
        and not source.adapters
        and isinstance(source.origin, Reference)
        and source.folder.parent.name == "snapshots"
    ):
        return f"{as_code(source.origin.repo)} at {as_code(source.folder.name)}"
    return as_code(written)


def _sample(expert: Expert) -> str:
    if not expert.positive_prompts:
        named = [text if text.startswith(SCHEME) else Path(text).name for text in expert.positive_texts]
        return ", ".join(f"texts in {as_code(name)}" for name in named)
    first = expert.positive_prompts[0]
    prompt = " ".join((first if isinstance(first, str) else first.said_by(COUNTED_ROLES)).split())
    return as_code(prompt if len(prompt) < _SAMPLE_LENGTH else prompt[: _SAMPLE_LENGTH - 3] + "...")
