"""The mean weight of each expert over text, and losses of dense models beside the mixture's on that text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moemerge.chats import Document
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import MERGED, estimate
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.runnable import open_mixture, stored
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.families.expert_view import DenseView
from moemerge.passes.compute_dtype import find_compute
from moemerge.progress import Progress

_DENSE = "dense"


class MeasuredMixture:
    """A mixture that was run over text."""

    def __init__(
        self,
        folder: Path | str,
        documents: Mapping[str, Sequence[Document]],
        settings: EvaluationSettings,
        progress: Progress = lambda _task, _done, _total: None,
    ) -> None:
        """Run a mixture over text.

        Args:
            folder: its folder.
            documents: text by domain.
            settings: how much text is read, and on which device.
            progress: called as models are run: the mixture, then a dense one.

        Raises:
            IncompatibleError: it is no mixture of a family that moemerge reads.
            CheckpointError: its files are damaged, or its numbers are not finite.
            RefusedError: there is no such device.
            RouterError: the tokenizer cannot be used.
        """
        mixture = open_mixture(folder)
        compute = find_compute(settings.device, settings.compute_dtype, mixture.runnable.layer_shapes)
        self._texts = Texts.cut(mixture, documents, settings.tokens, settings.window, settings.roles)
        self._runs = Runs(self._texts, compute, progress, planned=2)
        self._tally = RoutingTally(mixture, self._texts)
        self._runs.run(MERGED, mixture.runnable, mixture=mixture, tally=self._tally)

    @property
    def weights(self) -> dict[int, list[float]]:
        """The mean weight of each expert, by layer; those of a layer add up to 1."""
        return self._tally.weights

    def losses_of(self, view: DenseView) -> dict[str, tuple[float, float]]:
        """The mixture's loss and a dense model's, in nats per token, by domain."""
        model = view.model
        made = stored(_DENSE, model.family.model_type, model.class_keys, view.tensors)
        self._runs.run(_DENSE, made)
        found = {name: self._runs.sums[name] for name in (MERGED, _DENSE)}
        return {
            domain: (estimate(found[MERGED][domain]).value, estimate(found[_DENSE][domain]).value)
            for domain in self._texts.domains
        }
