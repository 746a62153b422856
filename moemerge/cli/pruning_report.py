"""What `moemerge prune` prints: the experts, what each layer loses, and losses before and after."""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from moemerge.cli.tables import Table

if TYPE_CHECKING:
    from moemerge.editing.pruning.judging import Judged
    from moemerge.editing.pruning.pruner import Decision


def pruning_facts(found: "Decision", losses: "Judged") -> dict[str, Any]:
    """Turn a pruning into the values that `--json` prints.

    Everything by layer is in the order of `layers`; those that text does not pass through are left out, and `notes`
    says what they keep.
    """
    from dataclasses import asdict

    pruning, saliency, similarity = found.pruning, found.saliency, found.similarity
    names, layers = found.mixture.experts, saliency.layers
    return {
        "experts": list(names),
        "layers": list(layers),
        "kept": [list(pruning.kept[layer]) for layer in layers],
        "members": [{str(one): list(those) for one, those in pruning.members[layer].items()} for layer in layers],
        "shares": [
            {str(one): {str(e): s for e, s in of.items()} for one, of in pruning.shares[layer].items()}
            for layer in layers
        ],
        "factors": list(pruning.factors),
        "duplicates": [[list(group) for group in pruning.duplicates[layer]] for layer in layers],
        "experts_per_token": pruning.experts_per_token,
        "saliency": saliency.reap.tolist(),
        "frequency": saliency.frequency.tolist(),
        "weight": saliency.weight.tolist(),
        "router_norm": saliency.router_norm.tolist(),
        "load": {name: load.tolist() for name, load in zip(saliency.domains, saliency.load, strict=True)},
        "output_differences": saliency.differences.tolist(),
        "nearly_equal": [list(pair) for pair in similarity.nearly_equal],
        "weight_distances": similarity.distances[[similarity.layers.index(layer) for layer in layers]].tolist(),
        "lost": [asdict(loss) for loss in pruning.losses],
        "before": {name: asdict(loss) for name, loss in losses.before.items()},
        "after": {name: asdict(loss) for name, loss in losses.after.items()},
        "difference": asdict(losses.difference),
        "judged_on_unseen_text": losses.unseen,
        "notes": list(pruning.notes),
    }


def print_pruning(console: Console, found: "Decision", losses: "Judged") -> None:
    """Print the experts, what each layer loses, and the losses."""
    _print_duplicates(console, found)
    _print_experts(console, found)
    _print_layers(console, found)
    _print_losses(console, losses)


def _print_duplicates(console: Console, found: "Decision") -> None:
    names = found.mixture.experts
    everywhere = found.similarity.groups_everywhere
    if everywhere:
        groups = "; ".join(" = ".join(names[expert] for expert in group) for group in everywhere)
        console.print(f"Equal in all layers, number for number: {groups}")
    for one, other in found.similarity.nearly_equal:
        weights = found.similarity.distances[:, one, other].mean()
        outputs = found.saliency.differences[:, one, other].mean()
        console.print(
            f"Nearly equal: {names[one]} and {names[other]}, whose weights differ by {weights:.2g} of their length and "
            f"outputs by {outputs:.2g}. They count as two experts; --merge averages what is alike"
        )
    some = [layer for layer, groups in found.pruning.duplicates.items() if groups and groups != everywhere]
    for layer in some:
        groups = "; ".join(" = ".join(names[e] for e in group) for group in found.pruning.duplicates[layer])
        console.print(f"Equal in layer {layer}: {groups}")


def _print_experts(console: Console, found: "Decision") -> None:
    """Print what was measured of each expert, averaged over layers, and what becomes of it."""
    saliency, names = found.saliency, found.mixture.experts
    shares = (saliency.reap / saliency.reap.sum(axis=1, keepdims=True).clip(min=1e-300)).mean(axis=0)
    frequency, weight = saliency.frequency.mean(axis=0), saliency.weight.mean(axis=0)
    console.print("Experts, averaged over layers; saliency as a share of the layer's sum:")
    table = Table("", "saliency", "chosen by", "weight there", *(f"of {name}" for name in saliency.domains), "")
    for expert, name in enumerate(names):
        loads = [f"{load[:, expert].mean():.1%}" for load in saliency.load]
        cells = (f"{shares[expert]:.1%}", f"{frequency[expert]:.1%}", f"{weight[expert]:.2f}")
        table.add_row(name, *cells, *loads, _fate(found, expert))
    console.print(table)


def _fate(found: "Decision", expert: int) -> str:
    """What becomes of an expert, in words."""
    pruning, names = found.pruning, found.mixture.experts
    layers = len(pruning.kept)
    kept = sum(expert in those for those in pruning.kept.values())
    if not pruning.is_uniform:
        return f"kept in {kept} of {layers} layers"
    if kept:
        return "kept"
    for one, those in next(iter(pruning.members.values())).items():
        if expert in those:
            is_copy = any({one, expert} <= {*group} for group in next(iter(pruning.duplicates.values())))
            return f"equal to {names[one]}" if is_copy else f"averaged into {names[one]}"
    return "dropped"


def _print_layers(console: Console, found: "Decision") -> None:
    pruning, names = found.pruning, found.mixture.experts
    if not pruning.loses:
        console.print("No layer loses an FFN: every dropped expert equals a kept one.")
        return
    words = "What each layer loses" if not any(pruning.shares.values()) else "What goes into averages in each layer"
    console.print(f"{words}:")
    table = Table("layer", "of the saliency", "tokens that chose it", *([] if pruning.is_uniform else ["dropped"]))
    for loss in pruning.losses:
        dropped = [] if pruning.is_uniform else [", ".join(names[expert] for expert in loss.dropped)]
        table.add_row(str(loss.layer), f"{loss.saliency:.1%}", f"{loss.tokens:.1%}", *dropped)
    console.print(table)


def _print_losses(console: Console, losses: "Judged") -> None:
    where = "on other documents than those it was chosen by" if losses.unseen else "on the text it was chosen by"
    console.print(f"Loss in nats per token, {where}:")
    table = Table("", *losses.before, "mean of all")
    for name, found in (("before", losses.before), ("after", losses.after)):
        mean = sum(loss.value for loss in found.values()) / len(found)
        table.add_row(name, *(f"{loss.value:.4f}" for loss in found.values()), f"{mean:.4f}")
    console.print(table)
    console.print(f"After against before: {losses.difference.value:+.4f}{losses.difference.interval}")
