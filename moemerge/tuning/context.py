"""What every part of a tuning needs to know."""

from collections.abc import Callable
from dataclasses import dataclass

from moemerge.evaluation.runnable import MixtureModel
from moemerge.tuning.processes import Processes
from moemerge.tuning.settings import Settings
from moemerge.tuning.whole import MemoryPlan
from moemerge.tuning.work import Work


@dataclass(frozen=True)
class TuningContext:
    """One call of `tune`."""

    mixture: MixtureModel
    settings: Settings
    processes: Processes
    memory: MemoryPlan
    work: Work
    progress: Callable[[str, int, int], None]
    """Called with what is done, how far, and all there is."""
    announce: Callable[[str], None]
    """Called with lines for people who wait."""
