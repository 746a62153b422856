"""Plans, routing tables, inspections and verifications as text for people and as JSON for programs."""

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table as Grid

from moemerge.checkpoint.derived import derivation, leaves
from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Fill, Piece
from moemerge.checks.inspection import Inspection
from moemerge.checks.verification import Verification
from moemerge.cli.tables import Table
from moemerge.config.schema import CONFIG_COPY
from moemerge.dtypes import BITS, HEADER_DTYPES
from moemerge.engines import ENGINES
from moemerge.planning.output import Computed, Output
from moemerge.planning.plan import MergePlan
from moemerge.sources.reference import Reference
from moemerge.sources.stores import StoreFolder

if TYPE_CHECKING:
    from moemerge.routers.report import RoutingReport

_MOST_DIFFERENCES: Final = 20
# Of those that another config explains.
_MOST_KEYS: Final = 5

# What parts of multimodal models are called, by what is in their names.
_BESIDE_TEXT: Final = {"vis": "vision tower", "audio": "audio tower", "mtp": "next tokens"}


def billions(parameters: int) -> str:
    """Format a number of parameters: `1.23 B`, or `4.56 M` below 100 million."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 10**8 else f"{parameters / 1e6:.2f} M"


def about(seconds: float) -> str:
    """Format an estimated time as roughly as it is known: `a few seconds`, `about 40 s`, `about 6 min`."""
    if seconds < 10:  # noqa: PLR2004
        return "a few seconds"
    if seconds < 90:  # noqa: PLR2004
        return f"about {round(seconds, -1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"  # noqa: PLR2004


def plan_facts(plan: MergePlan) -> dict[str, Any]:
    """Turn a plan into the values that `moemerge plan --json` prints."""
    places = {name: (shard.name, start) for shard in plan.shards for name, start in shard.starts.items()}
    return {
        "family": plan.model_type,
        "dtype": plan.dtype,
        "gate_mode": plan.config.method.name,
        "shared_weights": plan.config.shared_weights.method,
        "tokenizer": plan.config.vocabulary,
        "shared_choice": asdict(plan.shared_choice) if plan.shared_choice else None,
        "experts": len(plan.config.experts),
        "expert_names": list(plan.config.expert_names),
        "experts_per_token": plan.config.experts_per_token,
        "total_parameters": plan.total_parameters,
        "active_parameters": plan.active_parameters,
        "output_bytes": plan.output_bytes,
        "free_bytes": shutil.disk_usage(Path.cwd()).free,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "pass_work": asdict(work) if (work := plan.pass_work) else None,
        "remote_bytes": plan.remote_bytes,
        "download_bytes": plan.download_bytes,
        "kept_bytes": plan.kept_bytes,
        "compared_bytes": plan.compared_bytes,
        "sources": [{"reference": source.reference, "folder": str(source.folder)} for source in plan.sources],
        "copied_files": list(plan.copied_files),
        "made_files": list(plan.made_files),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "advice": list(plan.advice),
        "right_in": list(plan.right_in),
        "config": plan.output_config,
        "shards": [{"name": shard.name, "bytes": shard.nbytes} for shard in plan.shards],
        "tensors": [
            {"name": name, "shape": list(output.shape), "shard": places[name][0], "start": places[name][1]}
            | _origin(output)
            for name, output in plan.outputs.items()
        ],
    }


def _origin(output: Output) -> dict[str, Any]:
    """Describe a tensor's source; one of several pieces has bands one below the other, each of pieces side by side."""
    if isinstance(output.origin, Computed):
        return {"from": output.origin.kind}
    if len(output.pieces) == 1:
        return _source(output.pieces[0])
    return {
        "bands": [[{"shape": list(piece.shape)} | _source(piece) for piece in band] for band in output.origin],
    }


def _source(piece: Piece) -> dict[str, Any]:
    source = piece.source
    if not isinstance(source, TensorInfo):
        return {"from": "constant"} | ({"value": source.value} if isinstance(source, Fill) else {})
    return {
        "from": str(source.path),
        "tensor": source.name,
        "dtype": source.dtype,
        "unchanged": piece.is_unchanged,
    }


def _engines(plan: MergePlan) -> str:
    """Say which engines compute the output rightly, and of which that is not known."""
    right = ", ".join(["transformers 5", *(ENGINES[engine] for engine in plan.right_in)])
    untried = ", ".join(ENGINES[engine] for engine in plan.shape.choice.untried)
    return f"right in {right}{f'; not tried with {untried}' if untried else ''}"


def _download_row(plan: MergePlan) -> dict[str, str]:
    kept = f", of which {size(plan.kept_bytes)} stay on the disk until the end" if plan.kept_bytes else ""
    needed, whole = f"{size(plan.download_bytes)} of {size(plan.remote_bytes)}", "; else all, into the cache"
    origins = [source.origin for source in plan.sources if not isinstance(source.origin, Path)]
    if any(isinstance(origin, Reference) for origin in origins):
        return {"to download": f"{needed} with --stream{kept}{whole}"}
    is_here = all(isinstance(origin, StoreFolder) and origin.location.kind == "file" for origin in origins)
    return {"to read" if is_here else "to download": f"{needed}{kept}"}


def print_plan(console: Console, plan: MergePlan) -> None:
    """Print the plan: its facts, where its tensors come from, and advice."""
    facts = Grid.grid(padding=(0, 2))
    free = shutil.disk_usage(Path.cwd()).free
    (architecture,) = plan.output_config["architectures"]
    rows = {
        "output": f"{architecture}, {plan.dtype}, {len(plan.config.experts)} experts, "
        f"{plan.config.experts_per_token} per token, routers: {plan.config.method.name}",
        "experts": ", ".join(plan.config.expert_names),
        "parameters": f"{billions(plan.total_parameters)} in all, {billions(plan.active_parameters)} active per token",
        "disk": f"{size(plan.output_bytes)} in {len(plan.shards)} shard(s); {size(free)} free here",
        "engines": _engines(plan),
        "memory": f"about {size(plan.peak_memory_bytes)} at the peak",
        "copied": ", ".join(plan.copied_files) or "no tokenizer files: the base model has none",
    }
    rows |= _pass_row(plan) | _tokenizer_row(plan)
    chosen_later = f"{', '.join(plan.candidates)}: chosen when the merge begins, shown here as the base's"
    rows |= {"shared weights": chosen_later} if plan.is_open else {}
    if plan.remote_bytes:
        rows |= _download_row(plan)
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)
    table = Table("tensors", "size", "from")
    parts: dict[tuple[str, str], list[int]] = {}
    for output in plan.outputs.values():
        if isinstance(output.origin, Computed):
            key = ("routers", f"gate_mode {plan.config.method.name}")
            parts.setdefault(key, []).append(math.prod(output.shape) * BITS[HEADER_DTYPES[plan.dtype]] // 8)
        for piece in output.pieces:
            origin = "constants"
            if isinstance(piece.source, TensorInfo):
                origin = _origin_of(piece.source, plan)
            parts.setdefault(("experts" if output.is_expert else "shared by all", origin), []).append(piece.nbytes)
    for (part, origin), sizes in parts.items():
        table.add_row(part, size(sum(sizes)), origin)
    console.print(table)
    for advice in plan.advice:
        console.print(f"advice: {advice}")


def _tokenizer_row(plan: MergePlan) -> dict[str, str]:
    """The line on the output's tokenizer, where it is no copy of the base's for sure."""
    if vocabulary := plan.shape.vocabulary:
        return {"tokenizer": f"{vocabulary.choice}: {len(vocabulary.ids)} tokens; proved when it is merged"}
    if plan.made_files:
        made = " and ".join(plan.made_files)
        return {"tokenizer": f"proved to give the base's ids when it is merged; {made} may be made"}
    return {}


def _pass_row(plan: MergePlan) -> dict[str, str]:
    """The line on what the base model reads for the routers, where it is run."""
    work = plan.pass_work
    if work is None:
        return {}
    tokens = float(f"{work.tokens:.2g}")
    return {
        "routers": f"{about(work.seconds)} on this CPU: some {tokens:,.0f} tokens through {work.layers} layers of the "
        "base model"
    }


def _origin_of(source: TensorInfo, plan: MergePlan) -> str:
    """The model that a tensor is read from, or what is made of which."""
    made = derivation(source)
    if made is None:
        return plan.origins.references.get(next(leaves(source)).path, source.path.name)
    return f"{made.name} {_origin_of(made.inputs[0], plan)}" if len(made.inputs) == 1 else made.name


def print_routing(console: Console, report: "RoutingReport", *, by_layer: bool) -> None:
    """Print what unseen text says of the routers; with `by_layer`, also how they route the text they were made from."""
    if not report.layers:
        return
    console.print(f"{report.on_unseen_text()}.")
    if not by_layer:
        return
    table = Table("expert", "own prompts", "first choice", "all prompts")
    for name, *shares in report.rows:
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    console.print(
        f"Tokens of the prompts and texts that the routers were made from, which reach each expert in the top "
        f"{report.experts_per_token} (chance {report.chance:.0%}; first choice's mean weight {report.top_weight:.2f}):"
    )
    console.print(table)
    layers = Table("layer", *report.experts, "weight")
    for row in report.layers:
        layers.add_row(str(row.layer), *row.shown, f"{row.top_weight:.2f}")
    console.print(layers)


def print_inspection(console: Console, found: Inspection) -> None:
    """Print a checkpoint's facts, and a table of the tensors with numbers that are not finite."""
    facts = Grid.grid(padding=(0, 2))
    kind = f"mixture of {found.experts} experts, {found.experts_per_token} per token" if found.experts else "dense"
    facts.add_row("model", f"{found.model_type}, {kind}, {found.layers} layers")
    active = f", {billions(found.active_parameters)} active per token" if found.experts else ""
    facts.add_row("parameters", billions(found.total_parameters) + active)
    stored = ", ".join(f"{size(nbytes)} {dtype}" for dtype, nbytes in found.dtype_bytes.items())
    facts.add_row("tensors", f"{found.tensors}: {stored}")
    if found.quantised:
        facts.add_row("quantised", "; ".join(found.quantised))
    for module, held in found.beside_text.items():
        name = next((name for part, name in _BESIDE_TEXT.items() if part in module), "beside text")
        facts.add_row(name, f"{held.tensors} tensor(s), {size(held.bytes)}: {module}")
    facts.add_row("files", f"{len(found.files)}, {size(sum(found.files.values()))}")
    facts.add_row("integrity", "see the warnings" if found.warnings else "index, headers and file sizes agree")
    values = found.values
    if values:
        damaged = f"infinite or NaN in {len(values.not_finite)} of {values.tensors} tensors"
        facts.add_row("values", damaged if values.not_finite else f"{values.tensors} tensors of finite numbers")
    console.print(facts)
    if values and values.not_finite:
        table = Table("tensor", "file", "infinite or NaN", "first at")
        for broken in values.not_finite:
            table.add_row(broken.tensor, broken.file, str(broken.count), str(list(broken.first)))
        console.print(table)


def print_verification(console: Console, out: str, found: Verification) -> None:
    """Print the first differences, their cause if it is another config, and one line on what is equal."""
    copied = f"{CONFIG_COPY}: "
    keys = [different.what.removeprefix(copied) for different in found.differences if different.what.startswith(copied)]
    others = [difference for difference in found.differences if not difference.what.startswith(copied)]
    if keys:
        more = ", ..." if len(keys) > _MOST_KEYS else ""
        console.print(
            f"{out}: was merged from another config, which differs in {', '.join(keys[:_MOST_KEYS])}{more}. "
            f"`moemerge verify {out}` compares it with its own."
        )
    most = _MOST_KEYS if keys else _MOST_DIFFERENCES
    for difference in others[:most]:
        console.print(f"  {difference.what}: expected {difference.expected}, found {difference.found}")
    if len(others) > most:
        console.print(f"  and {len(others) - most} more; --json lists all")
    verdict = f"{len(found.differences)} difference(s)" if found.differences else "as planned"
    console.print(
        f"{out}: {verdict}. Equal in every byte: {found.copied} copied tensors ({size(found.copied_bytes)}), "
        f"{found.converted} converted tensors ({size(found.converted_bytes)}), {found.files} files. "
        f"Not computed again: {found.routers} routers, which have the planned shape and dtype and are finite."
    )
