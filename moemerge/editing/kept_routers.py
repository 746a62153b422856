"""Router rows that stay in an edited mixture but for a factor on them, or for one row that is added to all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.checkpoint.derived import read_values
from moemerge.dtypes import ComputeDtype
from moemerge.editing.router_inputs import encode_documents, visit_router_inputs
from moemerge.evaluation.runnable import MixtureModel
from moemerge.families.stored_mixture import StoredMixture
from moemerge.passes.compute_dtype import find_compute
from moemerge.progress import Progress, Task
from moemerge.routers.added_rows import KeptRows
from moemerge.routers.edited_rows import part_offset, refit_scale, scaled_rows
from moemerge.routers.fitting import Labelled, default_lambda
from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.rows import Rows


@dataclass(frozen=True)
class TextPass:
    """A pass of text through a mixture, for its router inputs."""

    mixture: MixtureModel
    device: str
    compute_dtype: ComputeDtype
    progress: Progress
    tokens_per_expert: int = 4096
    seed: int = 0
    roles: Sequence[str] = COUNTED_ROLES

    def visit(self, documents: Sequence[Sequence[Document]], visit: Callable[[RouterInputs], None]) -> None:
        """Call `visit` with each layer's router inputs of documents by expert, and of neutral text."""
        compute = find_compute(self.device, self.compute_dtype, self.mixture.runnable.layer_shapes)
        prompts = encode_documents(
            self.mixture, documents, tokens=self.tokens_per_expert, seed=self.seed, roles=self.roles
        )
        report = self.progress
        visit_router_inputs(
            self.mixture, prompts, compute, visit, lambda done, total: report(Task("routers"), done, total)
        )


def refitted_rows(
    reading: TextPass, rows: Mapping[int, Rows], documents: Sequence[Sequence[Document]], experts_per_token: int
) -> dict[int, Rows]:
    """Scale kept rows for more experts per token than they were made for; see `refit_scale`.

    Args:
        reading: the pass.
        rows: rows (expert, hidden) of each layer.
        documents: text of each expert; neutral text is read beside it.
        experts_per_token: experts per token of the result.
    """
    mixture, made = reading.mixture, dict(rows)

    def visit(inputs: RouterInputs) -> None:
        kept = torch.from_numpy(rows[inputs.layer])
        before = mixture.per_token(inputs.layer)
        factor = refit_scale(inputs.states @ kept.T, before, experts_per_token, mixture.family.scoring)
        made[inputs.layer] = scaled_rows(kept, factor).numpy()

    reading.visit(documents, visit)
    return made


def joined_rows(
    reading: TextPass,
    kept: Mapping[int, Rows],
    others: Mapping[int, Rows],
    documents: tuple[Sequence[Document], Sequence[Document]],
) -> dict[int, Rows]:
    """Move the rows of a second mixture's experts so that tokens are divided rightly between the two.

    Within each mixture, its experts' rows stay commensurate; see `part_offset`.

    Args:
        reading: the pass, through the first mixture.
        kept: rows (expert, hidden) of the first mixture's experts in each layer.
        others: rows of the second mixture's experts.
        documents: text of all experts of the first mixture, and of all of the second.

    Returns:
        The second mixture's rows as they are in the result.
    """
    scoring, made = reading.mixture.family.scoring, {}

    def visit(inputs: RouterInputs) -> None:
        layer, chosen = inputs.layer, inputs.expert >= 0
        states, part = inputs.states[chosen], inputs.expert[chosen]
        weights = 1 / torch.bincount(part, minlength=2)[part]
        targets = torch.nn.functional.one_hot(part, 2).float()
        penalty = default_lambda(states.shape[1], len(states) // 2)
        data = Labelled(states, targets, weights * (len(weights) / weights.sum()), penalty)
        first, second = (KeptRows(torch.from_numpy(rows[layer]), scoring) for rows in (kept, others))
        made[layer] = (second.rows + part_offset(first, second, data)).numpy()

    reading.visit(documents, visit)
    return made


def stored_rows(mixture: StoredMixture, layer: int, numbers: Sequence[int]) -> Rows:
    """Read the router rows (expert, hidden) of some experts in a layer."""
    return read_values(mixture.router(layer))[list(numbers)]
