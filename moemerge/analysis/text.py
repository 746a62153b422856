"""What a mixture does with text: its router's choices and all experts' outputs, a layer at a time."""

from functools import partial
from typing import Any

import numpy as np
import torch

from moemerge.analysis.choice_figures import LayerChoices, agreement
from moemerge.analysis.figures import Numbers, TextFigures
from moemerge.analysis.generated import generated_load
from moemerge.analysis.output_figures import OutputSums, correlate, count_ranks, longest_first, sum_outputs
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.expert_outputs import ExpertOutputs
from moemerge.evaluation.layer_parts import LayerPart, measure_by_layer
from moemerge.evaluation.layer_tokens import LayerTokens
from moemerge.evaluation.processes import Processes
from moemerge.evaluation.runnable import MixtureModel
from moemerge.generation.loading import check_memory
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.device import free_memory
from moemerge.progress import Progress, Task


def analyze_text(
    mixture: MixtureModel,
    texts: Texts,
    compute: Compute,
    *,
    generate: int = 0,
    progress: Progress = lambda _task, _done, _total: None,
    processes: Processes | None = None,
) -> TextFigures:
    """Run a mixture over text, and measure choices and outputs of all its experts for all tokens.

    Of the model, one layer is in memory, twice while its experts are measured; of the tokens, what enters the layer and
    its router. Tokens pass through the experts that they choose, and once more through all to be measured. Generating
    needs the whole model in memory.

    Args:
        mixture: the mixture.
        texts: windows of text by domain.
        compute: the device and dtype to run in.
        generate: how many tokens are generated after the beginning of a few windows of each domain.
        progress: called with the layers done and all there are, and then with what is generated.
        processes: the processes that share the text; None for this one alone, which generates in any case.

    Raises:
        CheckpointError: the mixture's files are damaged, or its numbers are not finite.
        RefusedError: the whole model does not fit into memory; only with `generate`.
        RouterError: memory ran out, or there is no tokenizer; only with `generate`.
    """
    if generate:  # refused before what takes long
        check_memory(mixture.runnable, compute, free_memory(compute.device))
    tally = _Tally(mixture, texts)
    told = partial(progress, Task("layers", "the whole mixture", in_parts=processes is not None))
    measure_by_layer(mixture, texts, compute, _Measure, tally.add, told, processes)
    load, made = generated_load(mixture, texts, compute, generate, progress) if generate else (None, 0)
    return tally.found(load if made else None, made)


def _present(mixture: MixtureModel, layer: int) -> list[int]:
    """Numbers of the experts that a layer has."""
    absent = set(mixture.absent(layer))
    return [expert for expert in range(len(mixture.experts)) if expert not in absent]


class _Measure:
    """Measures the outputs of all experts of a layer."""

    def __init__(self, mixture: MixtureModel, compute: Compute) -> None:
        self._mixture, self._compute = mixture, compute
        self._outputs = ExpertOutputs(mixture, compute)

    def __call__(self, tokens: LayerTokens) -> LayerPart:
        numbers = _present(self._mixture, tokens.layer)
        experts = [self._outputs.expert(tokens.layer, number) for number in numbers]
        chosen = torch.zeros(tokens.logits.shape).scatter_(1, tokens.experts, 1.0)[:, numbers]
        made = sum_outputs(experts, tokens.inputs, chosen, self._compute)
        by_token = {name: getattr(tokens, name) for name in ("experts", "weights", "logits")}
        sums = {name: getattr(made, name) for name in ("near", "sums", "counts")}
        return LayerPart({**by_token, "lengths": made.lengths}, sums)


class _Tally:
    """Collects the figures of each layer."""

    def __init__(self, mixture: MixtureModel, texts: Texts) -> None:
        self._mixture, self._texts = mixture, texts
        masks = [torch.tensor(window.counted) for window in texts.windows]
        self._ids = torch.cat([torch.tensor(w.ids)[mask] for w, mask in zip(texts.windows, masks, strict=True)]).numpy()
        self._domain = np.repeat(texts.domain, [int(mask.sum()) for mask in masks])
        self._layers: list[dict[str, Any]] = []
        self._pairs: list[tuple[float, float]] = []
        self._last: LayerChoices | None = None

    def add(self, layer: int, part: LayerPart) -> None:
        """Add what was measured of a layer."""
        numbers = _present(self._mixture, layer)
        choices = self._choices(part, numbers)
        by_token, by_majority = choices.by_token()
        self._layers.append(
            {
                "load": choices.load(len(self._texts.domains)),
                "weight": choices.weight(),
                "choice_weight": choices.choice_weight(self._mixture.experts_per_token),
                "together": choices.together(),
                "entropy": choices.entropy(),
                "by_token": by_token,
                "by_majority": by_majority,
                **self._measured(part, numbers, choices),
            }
        )
        if self._last:
            same = float((self._last.first == choices.first).mean())
            self._pairs.append((agreement(self._last.first, choices.first), same))
        self._last = choices

    def _choices(self, part: LayerPart, numbers: list[int]) -> LayerChoices:
        present = np.zeros(len(self._mixture.experts), bool)
        present[numbers] = True
        experts, weights = part.by_token["experts"].numpy(), part.by_token["weights"].double().numpy()
        return LayerChoices(self._ids, self._domain, experts, weights, present)

    def _measured(self, part: LayerPart, numbers: list[int], choices: LayerChoices) -> dict[str, Any]:
        """The figures that take outputs."""
        logits = part.by_token["logits"]
        made = OutputSums(part.by_token["lengths"], **part.sums).figures(numbers, len(self._mixture.experts))
        softmax = self._mixture.choosing.scoring == "softmax"
        scores = (logits.softmax(dim=1) if softmax else logits.sigmoid()).double().numpy()
        sums = np.nansum(choices.given * made.lengths, axis=0)
        return {
            "output_similarity": made.similarity,
            "output_similarity_chosen": made.similarity_chosen,
            "output_similarity_others": made.similarity_others,
            "output_norm": made.lengths.mean(axis=0),
            "sparsity": made.sparsity,
            "ranks": count_ranks(logits.double().numpy(), made.lengths),
            "largest_first": longest_first(choices.first, made.lengths),
            "chance": 1 / len(numbers),
            "norm_correlation": correlate(scores, made.lengths),
            "saliency": sums / np.maximum(choices.chosen.sum(axis=0), 1),
            "mass_share": sums / sums.sum() if sums.any() else sums,
        }

    def found(self, generated: Numbers | None, generated_tokens: int) -> TextFigures:
        """All figures."""
        stacked = {name: np.stack([layer[name] for layer in self._layers]) for name in self._layers[0]}
        stacked["load"] = stacked["load"].transpose(1, 0, 2)
        pairs = np.array(self._pairs).reshape(-1, 2)
        return TextFigures(
            layers=tuple(self._mixture.moe_layers),
            names=self._mixture.experts,
            domains=self._texts.domains,
            tokens=tuple(
                sum(sum(self._texts.windows[window].counted) for window in self._texts.of(domain))
                for domain in range(len(self._texts.domains))
            ),
            agreement=pairs[:, 0],
            same_first=pairs[:, 1],
            generated=generated,
            generated_tokens=generated_tokens,
            **stacked,
        )
