"""The windows of a search's text: of the part to search by, in rounds that grow, and of the part that is held out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moemerge.evaluation.domain_texts import TextReader, Texts
from moemerge.passes.tokens import Window, count_scored
from moemerge.searching.dividing import Documents
from moemerge.searching.halving import first_windows, growing


@dataclass(frozen=True)
class SearchTexts:
    """Windows of both parts."""

    searched: Texts
    held_out: Texts
    rounds: tuple[tuple[int, ...], ...]
    """Numbers of the windows of `searched` that are new in each round."""

    @classmethod
    def read_by(cls, reader: TextReader, searched: Documents, held_out: Documents) -> "SearchTexts":
        """Read both parts; see `Texts.read_by`."""
        texts = Texts.read_by(replace(reader, first=first_windows(reader.tokens, reader.length)), searched)
        domains = [texts.of(domain) for domain in range(len(texts.domains))]
        lengths = ([len(texts.windows[window].ids) for window in windows] for windows in domains)
        parts = zip(*map(growing, lengths), strict=True)
        rounds = (
            tuple(windows[place] for windows, places in zip(domains, part, strict=True) for place in places)
            for part in parts
        )
        return cls(texts, Texts.read_by(reader, held_out), tuple(filter(None, rounds)))

    def windows(self, step: int) -> list[Window]:
        """The windows that are new in a round."""
        return [self.searched.windows[window] for window in self.rounds[step]]

    def tokens(self, steps: int) -> int:
        """Number of tokens that count in so many rounds."""
        return sum(count_scored(self.windows(step)) for step in range(steps))

    def by_domain(self, losses: Mapping[int, float]) -> list[float]:
        """Compute the loss per token of each domain (domain,) from the losses of windows by their numbers."""
        texts = self.searched
        found = []
        for domain in range(len(texts.domains)):
            own = [window for window in texts.of(domain) if window in losses]
            found.append(sum(losses[w] for w in own) / count_scored(texts.windows[w] for w in own))
        return found
