"""Changes to a mixture's experts, as the command line says them, and the config that says the same."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from moemerge.config.cross_checks import MIN_EXPERTS
from moemerge.config.schema import MergeConfig, RoutedExpert
from moemerge.errors import RefusedError
from moemerge.families.stored_mixture import StoredMixture, number_of

# What a config says of an expert beside its model, which an edit keeps for its router's sake and for later edits.
_DESCRIPTIONS: Final = ("positive_prompts", "negative_prompts", "positive_texts", "negative_texts")


@dataclass(frozen=True)
class Changes:
    """Changes to a mixture's experts, which are applied in the order of the fields; experts by name or number."""

    keep: Sequence[str] = ()
    """The experts that stay, in this order; nothing for all."""
    drop: Sequence[str] = ()
    """Experts that are left out."""
    replace: Mapping[str, str] = field(default_factory=dict)
    """Models that take the places of experts, by the expert."""
    add: Mapping[str, str] = field(default_factory=dict)
    """Models that become further experts, by the new expert's name."""
    order: Sequence[str] = ()
    """All experts in their new order; nothing for the order that they have."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """New names of experts, by the expert."""
    experts_per_token: int | None = None
    """How many experts take each token; None for as many as before, or for all where fewer are left."""
    granularity: int = 1
    """How many narrower experts each expert is split into."""
    width: int | None = None
    """How many neurons each expert is padded to; None for no more than the widest has."""
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Positive prompts of replaced and added experts, by the expert."""
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Files with positive text of replaced and added experts, by the expert."""


def edit_document(
    mixture: StoredMixture, reference: str, changes: Changes, config: MergeConfig | None = None
) -> dict[str, Any]:
    """Write the config of an edit, as keys and values.

    Args:
        mixture: the mixture that is edited.
        reference: the mixture's folder or repository, as the config shall name it.
        changes: the changes.
        config: the config that the mixture was made from, if it is known: its experts' prompts and texts stay.

    Raises:
        RefusedError: an option names no expert, or one that is not there any more.
    """
    if (changes.prompts or changes.texts) and not (changes.add or changes.replace):
        raise RefusedError(
            "--prompt, --text: no expert is added or replaced, so nothing is fitted to text. `moemerge tune` trains "
            "the routers of a mixture."
        )
    experts = _Experts(mixture, reference, config)
    experts.keep(changes)
    experts.replace(changes.replace)
    experts.add(changes.add)
    experts.describe("--prompt", "positive_prompts", changes.prompts)
    experts.describe("--text", "positive_texts", changes.texts)
    experts.order(changes.order)
    experts.rename(changes.rename)
    left = len(experts.entries)
    if left < MIN_EXPERTS:
        only = next(iter(experts.entries), "NAME")
        raise RefusedError(
            f"a mixture has at least {MIN_EXPERTS} experts, and {left} would be left. `moemerge extract "
            f"{reference}#{only} OUT` makes a dense model of one."
        )
    per_token = changes.experts_per_token or min(mixture.experts_per_token, left)
    return {
        "base_model": reference,
        "experts": list(experts.entries.values()),
        "experts_per_token": per_token,
        **({"granularity": changes.granularity} if changes.granularity > 1 else {}),
        **({"expert_width": changes.width} if changes.width else {}),
    }


class _Experts:
    """The experts of a config that is being written: by a name of its own each, which is the old one at first."""

    def __init__(self, mixture: StoredMixture, reference: str, config: MergeConfig | None) -> None:
        self._mixture = mixture
        known = config.experts if config and len(config.experts) == mixture.experts else []
        self.entries: dict[str, dict[str, Any]] = {
            # A number in place of a name would be taken for another place once experts have moved.
            name: {"source_model": f"{reference}#{name}"}
            | ({} if name.isdecimal() else {"name": name})
            | (description_of(known[number]) if known else {})
            for number, name in enumerate(mixture.names)
        }

    def keep(self, changes: Changes) -> None:
        """Take out the experts that are not kept, and those that are dropped."""
        kept = [self._name("--keep", given) for given in changes.keep] or list(self.entries)
        if twice := [name for name, count in Counter(kept).items() if count > 1]:
            raise RefusedError(f"--keep: names {twice[0]} twice. `moemerge upcycle` makes copies of experts.")
        dropped = {self._name("--drop", given) for given in changes.drop}
        self.entries = {name: self.entries[name] for name in kept if name not in dropped}

    def replace(self, models: Mapping[str, str]) -> None:
        """Give experts other models; what described the old ones goes with them."""
        for given, model in models.items():
            name = self._name("--replace", given)
            self.entries[name] = {"source_model": model} | ({} if name.isdecimal() else {"name": name})

    def add(self, models: Mapping[str, str]) -> None:
        """Add experts behind those that are there."""
        for name, model in models.items():
            if name in self.entries:
                raise RefusedError(f"--add: there is an expert called {name!r} already. Choose another name.")
            self.entries[name] = {"source_model": model, "name": name}

    def describe(self, option: str, key: str, given: Mapping[str, Sequence[str]]) -> None:
        """Add prompts or texts to experts."""
        for name, texts in given.items():
            entry = self.entries[self._name(option, name)]
            entry[key] = [*entry.get(key, []), *texts]

    def order(self, given: Sequence[str]) -> None:
        """Put all experts into another order."""
        if not given:
            return
        names = [self._name("--order", one) for one in given]
        if sorted(names) != sorted(self.entries):
            missing = [name for name in self.entries if name not in names]
            problem = f"leaves out {missing[0]}" if missing else "names an expert twice"
            raise RefusedError(f"--order: expected each of {', '.join(self.entries)} once; it {problem}.")
        self.entries = {name: self.entries[name] for name in names}

    def rename(self, names: Mapping[str, str]) -> None:
        """Give experts other names."""
        for given, new in names.items():
            self.entries[self._name("--rename", given)]["name"] = new

    def _name(self, option: str, given: str) -> str:
        """The name of an expert that is given by its name, or by its number in the old mixture."""
        if given in self.entries:
            return given
        number = number_of(given, self._mixture)
        if isinstance(number, int) and (name := self._mixture.names[number]) in self.entries:
            return name
        known = ", ".join(self.entries)
        raise RefusedError(f"{option}: there is no expert {given!r}; there are {known}.")


def description_of(expert: RoutedExpert) -> dict[str, Any]:
    """The keys of an expert's entry in a config that say what it is for: its prompts and texts."""
    given = expert.model_dump(exclude_defaults=True, by_alias=True)
    return {key: given[key] for key in _DESCRIPTIONS if key in given}
