"""What an analysis says in sentences of experts that could be spared, and of those that take few or many tokens."""

import shlex
from collections.abc import Mapping
from math import pi
from pathlib import Path
from typing import Final

import numpy as np

from moemerge.analysis.experts import dead_experts, super_experts
from moemerge.analysis.figures import Analysis, Numbers, TextFigures
from moemerge.analysis.means import generated_distance, mean
from moemerge.analysis.sparing import find_spare, without_text
from moemerge.analysis.wording import Advice, listed, named_experts

_MOST_OPTIONS: Final = 4
_DIFFERS: Final = 0.1  # of the choices, and twice what chance gives


def advise_on_spare_experts(analysis: Analysis, text: TextFigures) -> Advice | None:
    """Say which experts could go: those that `prune` would leave out first, as long as they have little together.

    Of copies it leaves out all but one first, whatever they do; then nothing is said of others.
    """
    if analysis.weights.equal or not text.mass_share.any():
        return None
    missing = without_text(text)
    spare, mass = find_spare(analysis, text, missing), text.mass_share.mean(axis=0)
    on = f"on this text ({listed(text.domains)})"
    if not spare:
        known = np.delete(np.arange(len(text.names)), missing)
        least = int(known[mass[known].argmin()])
        share = f"{mass[least]:.1%} of weights times output lengths"
        equal = f"where an equal share is {mean(text.chance):.1%}"
        sentence = f"No expert is to spare {on}: {text.names[least]}, the least, has {share}, {equal}."
        return Advice("experts to spare", sentence + _unsaid(text, missing), is_notable=False)
    by_layer = text.mass_share[:, spare].sum(axis=1)
    worst = int(np.argmax(by_layer))
    names = listed([text.names[expert] for expert in spare])
    lost = f"{by_layer.mean():.1%} of weights times output lengths would be lost"
    most = f"at most {by_layer[worst]:.1%}, in layer {text.layers[worst]}"
    command = _command(analysis, text, len(text.names) - len(spare))
    sentence = f"{names} could go {on}: {lost}, {most} (`{command}`)."
    return Advice("experts to spare", sentence + _unsaid(text, missing), is_notable=True)


def _command(analysis: Analysis, text: TextFigures, keep: int) -> str:
    """The command that leaves the experts out; prune takes a model in a folder."""
    folder = shlex.quote(analysis.model) if Path(analysis.model).is_dir() else "FOLDER"
    given = " ".join(f"--data {shlex.quote(name)}=PATH" for name in text.domains[:_MOST_OPTIONS])
    more = " ..." if len(text.domains) > _MOST_OPTIONS else ""
    return f"moemerge prune {folder} OUT --keep {keep} {given}{more}"


def _unsaid(text: TextFigures, missing: tuple[int, ...]) -> str:
    """Name the experts that a text without theirs says nothing of."""
    if not missing:
        return ""
    names = listed([text.names[expert] for expert in missing])
    return f" That says nothing of {len(missing)} of {len(text.names)} experts, whose text was not given: {names}."


def advise_on_idle_experts(_analysis: Analysis, text: TextFigures) -> Advice:
    """Say which experts take hardly a token in a layer."""
    missing, present = without_text(text), ~np.isnan(text.output_norm)
    present[:, missing] = False
    idle = _without(dead_experts(text), missing)
    if not idle:
        shares = np.where(present, text.frequency, np.inf)
        layer, expert = np.unravel_index(int(shares.argmin()), shares.shape)
        least = f"{text.names[expert]} in layer {text.layers[layer]} takes the fewest, {shares[layer, expert]:.1%}"
        every = "Every expert whose text was given" if missing else "Every expert"
        sentence = f"{every} takes tokens in every layer; {least}."
        return Advice("idle experts", sentence + _unsaid(text, missing), is_notable=False)
    places = f"In {sum(map(len, idle.values()))} of {present.sum()} places (expert and layer)"
    named = listed(named_experts(text.names, text.layers, idle))
    sentence = f"{places} an expert takes less than a tenth of an equal share of this text's tokens: {named}."
    return Advice("idle experts", sentence + _unsaid(text, missing), is_notable=True)


def _without(found: Mapping[int, tuple[int, ...]], missing: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    held = {layer: tuple(expert for expert in experts if expert not in missing) for layer, experts in found.items()}
    return {layer: experts for layer, experts in held.items() if experts}


def advise_on_busy_experts(_analysis: Analysis, text: TextFigures) -> Advice:
    """Say which experts take nearly all tokens; on text of some experts alone, theirs may have to."""
    busy, shares, missing = super_experts(text), text.frequency, without_text(text)
    layer, expert = np.unravel_index(int(shares.argmax()), shares.shape)
    most = f"{text.names[expert]} in layer {text.layers[layer]} takes the most, {shares[layer, expert]:.1%}"
    if not busy:
        return Advice("super experts", f"No expert does the work of a shared one; {most}.", is_notable=False)
    named = named_experts(text.names, text.layers, busy)
    begin = f"Nearly all tokens choose {listed(named)}"
    if missing:
        names = listed([text.names[expert] for expert in missing])
        rest = (
            f"{len(missing)} of {len(text.names)} experts had no text of theirs. Give it, to see whether all tokens do"
        )
        sentence = f"{begin}; {most}. {rest}: {names}."
        return Advice("super experts", sentence, is_notable=False)
    work = "which does the work of a shared expert" if len(named) == 1 else "which do the work of shared experts"
    return Advice("super experts", f"{begin}, {work}; {most}.", is_notable=True)


def advise_on_generating(_analysis: Analysis, text: TextFigures) -> Advice | None:
    """Say how far the load while generating differs from that of reading."""
    distances, tokens = generated_distance(text), text.generated_tokens
    if np.isnan(distances).all():
        return None
    worst, chance = int(np.nanargmax(distances)), _by_chance(text)
    differs = mean(distances) >= max(_DIFFERS, 2 * chance)
    begin = "Generated text takes other experts than" if differs else "Generated text takes experts as does"
    told = f"{mean(distances):.1%} of the choices of {tokens} tokens go to others"
    most = f"at most {distances[worst]:.1%}, in layer {text.layers[worst]}"
    by_chance = f"by chance {chance:.1%} would"
    return Advice("generating", f"{begin} text that is read: {told}, {most}; {by_chance}.", differs)


def _by_chance(text: TextFigures) -> float:
    """Mean distance of two loads that differ only by which tokens were counted, if these chose independently."""
    shares = text.load.mean(axis=0)
    spread = np.sqrt(shares * np.clip(1 - shares, 0, 1) * (1 / text.generated_tokens + 1 / sum(text.tokens)) * 2 / pi)
    expected: Numbers = spread.sum(axis=1) / 2 / shares.sum(axis=1)
    return mean(expected)
