"""Router rows that stay in an edited mixture, but for one row that is added to all of a second mixture's."""

from collections.abc import Mapping, Sequence

import torch

from moemerge.chats import Document
from moemerge.checkpoint.derived import read_values
from moemerge.editing.router_inputs import RowPass
from moemerge.families.family import Scoring
from moemerge.families.stored_mixture import StoredMixture
from moemerge.routers.added_rows import KeptRows
from moemerge.routers.edited_rows import part_offset
from moemerge.routers.fitting import Labelled, default_lambda
from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.rows import Rows


def joined_rows(
    reading: RowPass,
    rows: Mapping[int, Rows],
    second: Sequence[int],
    documents: tuple[Sequence[Document], Sequence[Document]],
    scoring: Scoring,
) -> dict[int, Rows]:
    """Move the rows of a second mixture's experts so that tokens are divided rightly between the two.

    Within each mixture, its experts' rows stay commensurate; see `part_offset`.

    Args:
        reading: the pass.
        rows: rows (expert, hidden) of each layer, as both mixtures have them.
        second: numbers of the second mixture's experts in the result.
        documents: text of all experts of the first mixture, and of all of the second.
        scoring: how the routers weigh.
    """

    def moved(inputs: RouterInputs) -> torch.Tensor:
        made, chosen = torch.from_numpy(rows[inputs.layer]).clone(), inputs.expert >= 0
        states, part = inputs.states[chosen], inputs.expert[chosen]
        weights = 1 / torch.bincount(part, minlength=2)[part]
        targets = torch.nn.functional.one_hot(part, 2).float()
        penalty = default_lambda(states.shape[1], len(states) // 2)
        data = Labelled(states, targets, weights * (len(weights) / weights.sum()), penalty)
        first = [number for number in range(len(made)) if number not in second]
        made[list(second)] += part_offset(KeptRows(made[first], scoring), KeptRows(made[list(second)], scoring), data)
        return made

    return reading.make(documents, moved)


def stored_rows(mixture: StoredMixture, layer: int, numbers: Sequence[int]) -> Rows:
    """Read the router rows (expert, hidden) of some experts in a layer."""
    return read_values(mixture.router(layer))[list(numbers)]
