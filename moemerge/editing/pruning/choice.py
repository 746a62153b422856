"""Choose which experts a mixture keeps, and say what each layer loses with the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from moemerge.config.cross_checks import MIN_EXPERTS
from moemerge.errors import RefusedError
from moemerge.families.choosing import Choosing

if TYPE_CHECKING:  # torch is not imported to refuse a number
    from moemerge.editing.pruning.saliency import Saliency
    from moemerge.editing.pruning.similarity import Similarity

By = Literal["saliency", "frequency", "weight", "router"]
"""What experts are kept by: REAP's saliency, the share of tokens that choose them, their mean weight where they are
chosen, or the length of their router rows."""
Groups = tuple[tuple[int, ...], ...]
Scores = NDArray[np.float64]

_TINY: Final = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class PruneRequest:
    """What is asked for."""

    keep: int
    """Number of experts that each layer keeps. No family holds another number in each layer: transformers 5.23 refuses
    a list of numbers for every one of them, hunyuan_v1_moe too, although its router would read one."""
    by: By = "saliency"
    by_layer: bool = False
    """Whether each layer keeps the experts that are best there, instead of all layers the same ones."""
    merge: bool = False
    """Whether a dropped expert is averaged into the kept one that is most like it, instead of left out."""


@dataclass(frozen=True)
class LayerLoss:
    """What a layer loses with the experts that it drops; those with an equal one that is kept lose nothing."""

    layer: int
    dropped: tuple[int, ...]
    """Dropped experts without an equal one that is kept."""
    saliency: float
    """Their share of the layer's sum of weights times output lengths."""
    tokens: float
    """Share of tokens that had chosen one of them."""


@dataclass(frozen=True)
class Pruning:
    """The experts that are kept, and what becomes of the others; everything is by the number of a layer."""

    kept: Mapping[int, tuple[int, ...]]
    """Numbers of the kept experts, ascending."""
    members: Mapping[int, Mapping[int, tuple[int, ...]]]
    """For each kept expert the experts that it stands for, itself first: equal ones, and those averaged into it."""
    shares: Mapping[int, Mapping[int, Mapping[int, float]]]
    """For each kept expert that is an average of different FFNs, the share of each, which add up to 1; one that no
    token chooses has none, not even the kept one."""
    factors: tuple[float, ...]
    """Factors on the outputs of the kept experts, in their order; empty where routers divide weights by their sum or
    that of all, so that one expert gets what they gave several."""
    duplicates: Mapping[int, Groups]
    """Groups of equal experts."""
    experts_per_token: int
    losses: tuple[LayerLoss, ...]
    notes: tuple[str, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether all layers keep the same experts."""
        return len(set(self.kept.values())) == 1

    @property
    def loses(self) -> bool:
        """Whether an expert goes that equals no kept one."""
        return any(loss.dropped for loss in self.losses)

    def made_of(self, layer: int) -> list[dict[int, float]]:
        """The experts that each kept one is the average of in a layer, with their shares."""
        return [dict(self.shares[layer].get(expert, {expert: 1.0})) for expert in self.kept[layer]]

    def own(self, layer: int) -> list[int]:
        """The expert whose router row and biases each kept one has in a layer, the first that it is made of.

        It is itself, unless only others were chosen there.
        """
        return [next(iter(shares)) for shares in self.made_of(layer)]


def equal_groups(similarity: "Similarity", request: PruneRequest) -> dict[int, Groups]:
    """Groups of equal experts by layer: of those equal in all layers, unless each layer keeps its own."""
    everywhere = similarity.groups_everywhere
    return {layer: similarity.groups(layer) if request.by_layer else everywhere for layer in similarity.layers}


def choose_kept(
    saliency: "Saliency", duplicates: Mapping[int, Groups], request: PruneRequest, experts_per_token: int, how: Choosing
) -> Pruning:
    """Choose the experts to keep; of equal ones all but one go first, since nothing is lost with them.

    Args:
        saliency: what was measured, with the experts of `duplicates` together.
        duplicates: groups of equal experts by layer.
        request: what is asked for.
        experts_per_token: how many experts take each token now.
        how: how the routers choose; where they choose among groups of experts first, each group keeps as many.
    """
    scores = np.stack([_scores(saliency, duplicates[layer], request.by, p) for p, layer in enumerate(saliency.layers)])
    if not request.by_layer:
        scores[:] = scores.mean(axis=0)
    own = saliency.mass / np.maximum(saliency.mass.sum(axis=1, keepdims=True), _TINY)
    if not request.by_layer:
        own = np.broadcast_to(own.mean(axis=0), own.shape)
    kept, members, shares, losses = {}, {}, {}, []
    for place, layer in enumerate(saliency.layers):
        equal = duplicates[layer]
        kept[layer] = keep_best(scores[place], own[place], equal, request.keep, how.groups)
        members[layer] = _stand_for(kept[layer], equal, saliency.differences[place] if request.merge else None)
        shares[layer] = _shares(members[layer], equal, saliency.frequency[place])
        losses.append(_loss(saliency, place, kept[layer], equal))
    per_token = most_per_token(experts_per_token, request.keep, how)
    notes = []
    if per_token < experts_per_token:
        notes.append(
            f"experts_per_token is lowered from {experts_per_token} to {per_token}: no more are left to choose from"
        )
    is_shared = how.normalises or how.scoring == "softmax"
    factors = () if is_shared else tuple(_factor(saliency, members, place) for place in range(request.keep))
    return Pruning(kept, members, shares, factors, duplicates, per_token, tuple(losses), tuple(notes))


def most_per_token(experts_per_token: int, keep: int, how: Choosing) -> int:
    """How many of `keep` experts can take each token, at most as many as before."""
    return min(experts_per_token, keep // how.groups * how.chosen_groups)


def check_keep(keep: int, count: int, how: Choosing) -> None:
    """Refuse a number of experts that a mixture of `count` cannot be pruned to.

    Raises:
        RefusedError: says what is expected.
    """
    groups, best = how.groups, how.best_of_group
    if not MIN_EXPERTS <= keep < count:
        expected = f"expected {MIN_EXPERTS} to {count - 1}" if count > MIN_EXPERTS else "there is nothing to prune"
        hint = " `moemerge densify` makes one model of all." if keep < MIN_EXPERTS or count == MIN_EXPERTS else ""
        raise RefusedError(f"--keep: {keep} of {count} experts: {expected}.{hint}")
    if keep % groups:
        raise RefusedError(
            f"--keep: its routers choose among {groups} groups of experts of one size, which {keep} do not fill; "
            f"expected a multiple of {groups}."
        )
    if keep < groups * best:
        raise RefusedError(
            f"--keep: its routers judge each group by the {best} best, so that at "
            f"least {groups * best} experts have to stay."
        )


def keep_best(scores: Scores, own: Scores, equal: Groups, keep: int, groups: int) -> tuple[int, ...]:
    """Choose the experts of a layer that are kept: the best of each run; copies of a better one come after all others.

    Args:
        scores: what experts are kept by (expert,).
        own: what one of several with the same score, or of equal ones, is kept by (expert,).
        equal: groups of equal experts.
        keep: how many are kept.
        groups: number of equal runs of experts, of which each keeps as many.
    """
    first = {max(group, key=lambda expert: (own[expert], -expert)) for group in equal}
    copies = {expert for group in equal for expert in group} - first
    size = len(scores) // groups
    kept: list[int] = []
    for start in range(0, len(scores), size):
        ranked = sorted(range(start, start + size), key=lambda e: (e in copies, -scores[e], -own[e], e))
        kept += ranked[: keep // groups]
    return tuple(sorted(kept))


def _scores(saliency: "Saliency", equal: Groups, by: By, place: int) -> Scores:
    """A layer's scores (expert,), as shares of their sum; those of equal experts are of all of them together."""
    found = {
        "saliency": saliency.reap,
        "frequency": saliency.frequency,
        "weight": saliency.weight,
        "router": saliency.router_norm,
    }[by][place].copy()
    for group in equal if by != "saliency" else ():
        members = list(group)
        chosen = np.isin(saliency.choices[place], members).any(axis=1).mean()
        found[members] = chosen if by == "frequency" else found[members].max()
    scores: Scores = found / max(found.sum(), _TINY)
    return scores


def _stand_for(
    kept: Sequence[int], equal: Groups, differences: NDArray[np.float64] | None
) -> dict[int, tuple[int, ...]]:
    """Find for each kept expert those that it stands for: equal ones, and with `differences` those most like it."""
    members: dict[int, list[int]] = {expert: [expert] for expert in kept}
    group_of = {expert: group for group in equal for expert in group}
    count = 1 + max(*kept, max(group_of, default=0), -1 if differences is None else len(differences) - 1)
    for expert in set(range(count)) - set(kept):
        here = [other for other in group_of.get(expert, ()) if other in members]
        if here:
            members[here[0]].append(expert)
        elif differences is not None:
            members[min(kept, key=lambda other: differences[expert, other])].append(expert)
    return {expert: tuple(those) for expert, those in members.items()}


def _shares(members: Mapping[int, Sequence[int]], equal: Groups, frequency: Scores) -> dict[int, dict[int, float]]:
    """Shares of the FFNs that are averaged, by how often each was chosen; equal FFNs need no average."""
    group_of = {expert: group for group in equal for expert in group}
    found = {}
    for expert, those in members.items():
        others = [other for other in those if other not in group_of.get(expert, (expert,))]
        total = sum(frequency[other] for other in those)
        if others and total > 0:
            found[expert] = {other: float(frequency[other] / total) for other in those if frequency[other] > 0}
    return found


def _factor(saliency: "Saliency", members: Mapping[int, Mapping[int, Sequence[int]]], place: int) -> float:
    """How many of those that a kept expert stands for were chosen together: the median over tokens that chose some."""
    groups = [tuple(members[layer].values())[place] for layer in saliency.layers]
    counts = [np.isin(chosen, group).sum(axis=1) for chosen, group in zip(saliency.choices, groups, strict=True)]
    together = np.concatenate(counts)
    return float(np.median(together[together > 0])) if together.any() else 1.0


def _loss(saliency: "Saliency", place: int, kept: Sequence[int], equal: Groups) -> LayerLoss:
    held = set(kept)
    for group in equal:
        if held & set(group):
            held |= set(group)
    count = saliency.reap.shape[1]
    dropped = tuple(expert for expert in range(count) if expert not in held)
    mass = saliency.mass[place]
    share = float(mass[list(dropped)].sum() / max(mass.sum(), _TINY)) if dropped else 0.0
    chosen = float(np.isin(saliency.choices[place], dropped).any(axis=1).mean()) if dropped else 0.0
    return LayerLoss(saliency.layers[place], dropped, share, chosen)
