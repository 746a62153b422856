"""The settings and resources that every part of a tuning needs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.compute_dtype import Compute, choose_dtype
from moemerge.progress import Progress
from moemerge.tuning.processes import Processes
from moemerge.tuning.resume_folder import WorkFolder
from moemerge.tuning.settings import Settings
from moemerge.tuning.whole_model import MemoryPlan


@dataclass(frozen=True)
class TuningContext:
    """The context of one call of `tune`."""

    mixture: MixtureModel
    settings: Settings
    processes: Processes
    memory: MemoryPlan
    work: WorkFolder
    progress: Progress
    announce: Callable[[str], None]
    """Called with lines for the user who waits."""

    @cached_property
    def teaching(self) -> Compute:
        """What teachers are run in."""
        device = self.processes.device
        return Compute(device, choose_dtype(device, self.settings.compute_dtype, self.mixture.runnable.layer_shapes))
