"""The model card of a merged model: what it is made of, how it routes, how to run it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from moemerge.chats import COUNTED_ROLES
from moemerge.config.schema import CARD, CONFIG_COPY, Expert
from moemerge.errors import RefusedError
from moemerge.model_card.markdown import as_code, as_text
from moemerge.model_card.metadata import licence_fields, read_metadata, rewritten
from moemerge.model_card.usage import use_it
from moemerge.planning.plan import MergePlan
from moemerge.printable import printable
from moemerge.sources.data_sets import SCHEME
from moemerge.sources.reference import Reference, parse_reference
from moemerge.texts.documents import hub_revisions

if TYPE_CHECKING:
    from moemerge.evaluation.figures import Estimate, Evaluation
    from moemerge.routers.report import RoutingReport

_TAGS: Final = ["moe", "merge", "frankenmoe", "moemerge"]
_SAMPLE_LENGTH: Final = 60
_CONFIGURATION: Final = "## Configuration"


def write_card(
    folder: Path,
    name: str,
    plan: MergePlan,
    report: "RoutingReport",
    licence: str | None = None,
    *,
    notes: Sequence[str] = (),
) -> None:
    """Write `README.md` with the Hub's metadata into `folder`; name, licence and notes are the merged model's."""
    body = _body(name, plan, report, [*plan.family_notes, *notes])
    _save(folder, plan, licence, body)


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
        pipeline_tag="text-generation",
        datasets=list(dict.fromkeys(data.repo for data in plan.data_sets)) or None,
        tags=_TAGS,
        **licence_fields(licence or ""),  # type: ignore[arg-type]  # some keys of many
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / CARD)


def compare_card(folder: Path, plan: MergePlan) -> list[tuple[str, str]]:
    """Find what a merged model's card lacks or says otherwise: the expected words, and those that are found.

    Titles, licences and measured figures are not compared; what the model is made of is the plan's.
    """
    path = folder / CARD
    if not path.is_file():
        return [("a model card", "absent")]
    text = path.read_text(encoding="utf-8", errors="replace")
    copy = folder / CONFIG_COPY
    expected = [*_facts(plan), *_callouts("Warning", plan.warnings), *_callouts("Note", plan.family_notes)]
    if copy.is_file():
        expected.append(_block(copy.read_text(encoding="utf-8", errors="replace")))
    lost = [(fact, "not in it") for fact in expected if fact not in text]
    try:
        named = read_metadata(path).get("base_model")
    except RefusedError as error:
        return [*lost, ("metadata in YAML", str(error))]
    repos = _repositories(plan)
    return lost if named == (repos or None) else [*lost, (f"base_model: {repos}", f"base_model: {named!r:.200}")]


def _repositories(plan: MergePlan) -> list[str]:
    """The repositories that the model is made of, as far as it is on the Hub."""
    adapters = [parse_reference(adapter.reference) for source in plan.sources for adapter in source.adapters]
    origins = [*(source.origin for source in plan.sources), *adapters]
    return list(dict.fromkeys(origin.repo for origin in origins if isinstance(origin, Reference)))


def _facts(plan: MergePlan) -> list[str]:
    """The parts of a card that follow from the plan alone: what the model is, how large, and of which experts."""
    config = plan.config
    layers = plan.mixture.moe_layers
    where = "" if not plan.mixture.dense_layers else f" in {len(layers)} of {plan.base.layers} layers"
    return [
        f"A {plan.family.model_type} of {len(config.experts)} experts{where}, {config.experts_per_token} per token, "
        f"made with moemerge: embeddings, attention and norms {_shared(plan)}, each expert's FFNs "
        f"{'with its own norms folded in, ' if config.fold_norms else ''}from its own model, "
        f"routers from `gate_mode: {config.method.name}`.",
        f"**{_millions(plan.total_parameters)} parameters, {_millions(plan.active_parameters)} active per token, "
        f"{plan.dtype}.**",
        *(
            f"| {number} | {_shown(expert.source_model, plan)} | {_sample(expert)} |"
            for number, expert in enumerate(config.experts)
        ),
        *(f"| shared | {_shown(expert.source_model, plan)} | {_sample(expert)} |" for expert in config.shared_experts),
    ]


def _body(name: str, plan: MergePlan, report: "RoutingReport", notes: Sequence[str]) -> str:
    what, size, *experts = _facts(plan)
    sections = [
        f"# {as_text(name)}",
        what,
        size,
        "\n".join(["| expert | model | made for prompts such as |", "|---|---|---|", *experts]),
        "\n".join(_callouts("Warning", plan.warnings)),
        "\n".join(_callouts("Note", notes)),
        "## Use",
        *use_it(name, plan.family.model_type, plan.right_in),
        "## Routing\n\n" + _routing(report) + _data_sets(plan),
        f"{_CONFIGURATION}\n\n{_block(plan.config.text)}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _callouts(kind: Literal["Note", "Warning"], texts: Sequence[str]) -> list[str]:
    return [f"> **{kind}:** {as_text(text)}." for text in texts]


def _block(config: str) -> str:
    """Format a config's text as a block of code; characters that would change its display are written as escapes."""
    # A prompt may hold a code fence of its own.
    fence = max(["```", *(f"{ticks}`" for ticks in re.findall(r"`{3,}", config))], key=len)
    return f"{fence}yaml\n{printable(config.rstrip())}\n{fence}"


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
    with rewritten(folder / CARD) as draft:
        draft.write_text(with_section(text, "evaluation", _evaluation(found)), encoding="utf-8")


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


def loss_table(
    head: str, domains: Sequence[str], losses: Mapping[str, Mapping[str, "Estimate"]], means: Mapping[str, float]
) -> list[str]:
    """Write a Markdown table with a row per entry: losses in nats per token by domain, intervals, and their mean."""
    lines = [f"| {head} | {' | '.join(map(as_text, domains))} | mean |", "|---" * (len(domains) + 2) + "|"]
    for row, found in losses.items():
        cells = [f"{found[name].value:.3f}{found[name].interval}" if name in found else "" for name in domains]
        lines.append(f"| {as_text(row)} | {' | '.join(cells)} | {f'{means[row]:.3f}' if row in means else ''} |")
    return lines


def _evaluation(found: "Evaluation") -> str:
    names = [domain.name for domain in found.domains]
    lines = [
        "## Evaluation",
        "",
        "Loss in nats per token on held-out text ("
        + ", ".join(
            f"{as_text(domain.name)}: {domain.tokens} tokens of {domain.documents} documents"
            for domain in found.domains
        )
        + "), with 95 % intervals over documents where there are at least 5.",
        "",
        *loss_table("model", names, found.losses, found.mean_losses),
    ]
    if found.recovered_mean:
        mean_share = found.recovered_mean
        lines += [
            "",
            "Of what choosing the right expert gains over mixing all alike, the router recovers "
            f"{mean_share.value:.2f}{mean_share.interval}.",
        ]
    heads = " | ".join(f"to {as_text(name)}" for name in found.experts)
    lines += [
        "",
        f"| tokens of | right expert first | {heads} | first choice's weight |",
        "|---" * (len(found.experts) + 3) + "|",
    ]
    for name, routing in found.routing.items():
        right = "" if routing.accuracy is None else f"{routing.accuracy:.1%}"
        loads = " | ".join(f"{share:.1%}" for share in routing.load)
        lines.append(f"| {as_text(name)} | {right} | {loads} | {routing.top_weight:.2f} |")
    return "\n".join([*lines, *(f"\n{note}" for note in _callouts("Note", found.notes))])


def _shared(plan: MergePlan) -> str:
    """Say where embeddings, attention and norms come from."""
    base, method = _shown(plan.config.base_model, plan), plan.config.shared_weights.method
    if method == "base":
        return f"come from {base}"
    if method == "average":
        return f"are the mean of the experts', embeddings where vocabularies agree (else, and the tokenizer: {base})"
    return f"are those of {base} with what the experts changed, by {method.upper()}"


def _shown(reference: str, plan: MergePlan) -> str:
    """Show a source as the config names it, or as its repository and commit."""
    source = next((source for source in plan.sources if source.reference == reference), None)
    if (
        source
        and not source.adapters
        and isinstance(source.origin, Reference)
        and source.folder.parent.name == "snapshots"
    ):
        return f"{as_code(source.origin.repo)} at {as_code(source.folder.name)}"
    return as_code(reference)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _sample(expert: Expert) -> str:
    if not expert.positive_prompts:
        named = [text if text.startswith(SCHEME) else Path(text).name for text in expert.positive_texts]
        return ", ".join(f"texts in {as_code(name)}" for name in named)
    first = expert.positive_prompts[0]
    prompt = " ".join((first if isinstance(first, str) else first.said_by(COUNTED_ROLES)).split())
    return as_code(prompt if len(prompt) < _SAMPLE_LENGTH else prompt[: _SAMPLE_LENGTH - 3] + "...")


def _data_sets(plan: MergePlan) -> str:
    """Say at which commits the data sets on the Hub were read that routers were made from."""
    named = map(as_code, hub_revisions([data.name for data in plan.data_sets]))
    return f"\n\nThe routers were made from data sets on the Hub: {', '.join(named)}." if plan.data_sets else ""


def _routing(report: "RoutingReport") -> str:
    if not report.layers:
        return "No text says which expert is for what, so nothing is known of how these routers choose."
    lines = [
        "Of the tokens of each expert's own positive prompts, the share that reaches it among the "
        f"{report.experts_per_token} chosen, or as the first choice, and its share of all prompts' tokens "
        f"(chance: {report.chance:.0%}). These "
        "are the prompts that the routers were made from; other text routes less clearly.",
        "",
        "| expert | own prompts | own prompts, first choice | all prompts |",
        "|---|---|---|---|",
        *(
            f"| {as_text(name)} | {own:.1%} | {first:.1%} | {load:.1%} |"
            for name, own, first, load in zip(report.experts, report.own, report.first, report.load, strict=True)
        ),
        "",
        f"The first choice has a mean weight of {report.top_weight:.2f}."
        + (
            ""
            if report.held_out is None
            else f" Rows made without a document put the right expert first for {report.held_out:.1%} of its tokens."
        ),
        "",
        *_callouts("Warning", report.warnings()),
        "",
        "<details><summary>By layer: own prompts</summary>",
        "",
        f"| layer | {' | '.join(map(as_text, report.experts))} | first choice's weight |",
        "|---" * (len(report.experts) + 2) + "|",
        *(f"| {row.layer} | {' | '.join(row.shown)} | {row.top_weight:.2f} |" for row in report.layers),
        "",
        "</details>",
    ]
    return "\n".join(lines)
