"""What enters a mixture's routers when text passes through it, and rows that are made of that on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.dtypes import ComputeDtype
from moemerge.evaluation.runnable import MixtureModel
from moemerge.evaluation.running import read_router_inputs
from moemerge.passes.compute_dtype import Compute, find_compute
from moemerge.passes.tokens import Window, by_transformers, cut_windows
from moemerge.progress import Progress, Task
from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.prompts import NEUTRAL, NEUTRAL_TEXT, WINDOW, EncodedPrompt
from moemerge.routers.rows import Rows


@dataclass(frozen=True)
class RowPass:
    """A pass of text through a mixture whose router rows are made on the way.

    A layer's rows are made of what enters the router there, and the text passes on through them: what enters later
    layers is what enters them in the result.
    """

    mixture: MixtureModel
    """The mixture with all experts of the result; its own router rows do not matter."""
    device: str
    compute_dtype: ComputeDtype
    progress: Progress
    parts: int = 1
    """Into how many experts each is split, with equal rows."""
    tokens_per_expert: int = 4096
    seed: int = 0
    """Decides which documents come first."""
    roles: Sequence[str] = COUNTED_ROLES

    def make(
        self, documents: Sequence[Sequence[Document]], rows: Callable[[RouterInputs], torch.Tensor]
    ) -> dict[int, Rows]:
        """Make the rows (expert, hidden) of each layer, experts counted before they are split.

        Args:
            documents: the documents of each number that router inputs are labelled with; neutral text is read beside
                them.
            rows: a function from a layer's router inputs to its rows.

        Raises:
            RouterError: the mixture's tokenizer cannot be used.
            RefusedError: there is no such device, or a chat cannot be read.
            CheckpointError: the mixture's numbers are not finite.
        """
        compute = find_compute(self.device, self.compute_dtype, self.mixture.runnable.layer_shapes)
        prompts = encode_documents(
            self.mixture, documents, tokens=self.tokens_per_expert, seed=self.seed, roles=self.roles
        )
        made: dict[int, Rows] = {}

        def visit(inputs: RouterInputs) -> torch.Tensor:
            found = rows(inputs)
            made[inputs.layer] = found.numpy()
            return found.repeat_interleave(self.parts, dim=0)

        report = self.progress
        visit_router_inputs(
            self.mixture, prompts, compute, visit, lambda done, total: report(Task("routers"), done, total)
        )
        return made


def encode_documents(
    mixture: MixtureModel,
    documents: Sequence[Sequence[Document]],
    *,
    tokens: int,
    seed: int,
    roles: Sequence[str] = COUNTED_ROLES,
) -> tuple[EncodedPrompt, ...]:
    """Cut documents into windows, each with the number of its expert, and moemerge's neutral text with `NEUTRAL`.

    Args:
        mixture: the mixture, whose tokenizer is used.
        documents: the documents of each expert; there may be none.
        tokens: how many tokens of each expert's documents are read.
        seed: decides which documents come first.
        roles: whose messages of chats count.

    Raises:
        RouterError: the mixture's tokenizer cannot be used.
        RefusedError: its chat template does not take a chat.
    """
    encode = by_transformers(mixture.folder, roles=roles)
    length = min(WINDOW, int(mixture.runnable.keys.get("max_position_embeddings", WINDOW + 1)) - 1)
    encoded, first = [], 0
    for expert, texts in (*enumerate(documents), (NEUTRAL, NEUTRAL_TEXT)):
        windows = cut_windows(texts, encode, tokens=tokens, length=length, seed=seed, even=True)
        encoded += [EncodedPrompt(expert, True, w.ids, w.counted, first + w.document) for w in windows]
        first += len(texts)
    return tuple(encoded)


def visit_router_inputs(
    mixture: MixtureModel,
    prompts: Sequence[EncodedPrompt],
    compute: Compute,
    visit: Callable[[RouterInputs], torch.Tensor | None],
    progress: Callable[[int, int], None],
) -> None:
    """Call `visit` with the router inputs of each layer that has a router; the next layer's take the place of them.

    Args:
        mixture: the mixture that the windows pass through.
        prompts: the windows of text.
        compute: the device and dtype to run in.
        visit: called with each layer's router inputs; rows (expert, hidden) that it returns take the place of the
            router's before the text passes on.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the mixture's tensors do not fit its class, or numbers are not finite.
    """
    counts = [sum(prompt.counted) for prompt in prompts]
    hidden = mixture.runnable.shapes[mixture.router(mixture.moe_layers[0])][-1]
    states, beginnings = torch.empty(sum(counts), hidden), torch.empty(len(prompts), hidden)
    places, counted = torch.split(states, counts), [torch.tensor(prompt.counted) for prompt in prompts]
    number = torch.repeat_interleave(torch.tensor(counts))

    def enter(window: int, inputs: torch.Tensor) -> None:
        places[window].copy_(inputs[counted[window]])
        beginnings[window] = inputs[0]

    def rows(layer: int) -> torch.Tensor | None:
        return visit(RouterInputs(layer, states, number, tuple(prompts), beginnings))

    windows = [Window(prompt.document, prompt.ids, prompt.counted) for prompt in prompts]
    read_router_inputs(mixture, windows, compute, enter, rows=rows, progress=progress)
