"""Processes of a Ray cluster that share text: each runs the model over its part, and gives back sums."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moemerge.cluster import Cluster
from moemerge.evaluation.choices import Choice
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.evaluation.running import run_model
from moemerge.joining import ray_cluster
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.sharing_out import hands_of
from moemerge.passes.tokens import Window
from moemerge.ray_process import files_of_all_machines


class ChoiceTally(Protocol):
    """What is kept of the choices of a mixture's routers; small, since it goes from process to process."""

    def add(self, choice: Choice) -> None:
        """Add the choices of a layer for a window."""

    def part(self, windows: Sequence[int]) -> "ChoiceTally":
        """Make an empty tally for some of the windows, which are numbered from 0 on in it."""

    def join(self, part: Any, windows: Sequence[int]) -> None:
        """Add what a tally by `part` of the same windows has found."""


@dataclass(frozen=True)
class _Work:
    """What each process is asked for."""

    model: Runnable
    mixture: MixtureModel | None
    losses: bool


class _Worker:
    """A process of the cluster."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    @files_of_all_machines()
    def work(self, function: Callable[..., Any], *given: Any) -> Any:
        """Call a function with what this process computes in, and what is given."""
        return function(self._compute, *given)


def _run_part(
    compute: Compute, work: _Work, windows: Sequence[Window], tally: ChoiceTally | None
) -> tuple[list[float], ChoiceTally | None]:
    """Run a model over some windows; returns their losses, and the tally."""
    chosen = tally.add if tally else _ignore
    losses = run_model(work.model, windows, compute, mixture=work.mixture, chosen=chosen, losses=work.losses)
    return losses.tolist(), tally


def _ignore(_choice: Choice) -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """Processes that each read a model's weights themselves, and pass a part of the text through it."""

    cluster: Cluster
    actors: list[Any]

    def share(
        self,
        function: Callable[..., Any],
        all_given: Any,
        given: Sequence[tuple[Any, ...]],
        progress: Callable[[int, int], None],
    ) -> list[Any]:
        """Let processes call a function, each with its compute, what all are given, and its own of what is given.

        Args:
            function: a function of a module.
            all_given: what is sent once to each machine.
            given: further arguments of each process, at most as many as there are processes.
            progress: called with the number of processes that are done, and all of them.

        Raises:
            MoemergeError: a process failed, and so did those that took its place; or the function has raised it.
        """
        sent = self.cluster.ray.put(all_given)
        waiting = [actor.work.remote(function, sent, *own) for actor, own in zip(self.actors, given, strict=False)]
        return self.cluster.results(waiting, progress)

    def deal(self, windows: Sequence[Window]) -> list[list[int]]:
        """Deal the numbers of windows out to the processes, by their lengths."""
        return hands_of([len(window.ids) for window in windows], len(self.actors))

    def run(
        self,
        work: _Work,
        windows: Sequence[Window],
        tally: ChoiceTally | None,
        progress: Callable[[int, int], None],
    ) -> torch.Tensor:
        """Run a model over windows that are dealt out by their lengths; see `run_windows`."""
        hands = self.deal(windows)
        given = [([windows[window] for window in hand], tally and tally.part(hand)) for hand in hands]
        losses = torch.zeros(len(windows), dtype=torch.float64)
        for hand, (of_hand, part) in zip(hands, self.share(_run_part, work, given, progress), strict=True):
            losses[hand] = torch.tensor(of_hand, dtype=torch.float64)
            if tally:
                tally.join(part, hand)
        return losses


def run_windows(  # noqa: PLR0917
    model: Runnable,
    windows: Sequence[Window],
    compute: Compute,
    processes: Processes | None,
    mixture: MixtureModel | None,
    tally: ChoiceTally | None,
    progress: Callable[[int, int], None],
    *,
    losses: bool = True,
) -> torch.Tensor:
    """Compute losses as `run_model` does, in this process or in several.

    Args:
        model: the model to run.
        windows: the windows of text.
        compute: the devices and dtype to run in.
        processes: the processes that share the windows; None for this one alone.
        mixture: the mixture that `model` is, if its choices are to be counted.
        tally: counts them.
        progress: called with the layers done and all there are; with processes, those that are done and all.
        losses: whether losses are wanted; else they are 0.

    Raises:
        CheckpointError: the tensors do not fit the class, or numbers are not finite; says where that began.
        RefusedError: another machine has no such files.
        MoemergeError: a process failed, and so did those that took its place.
    """
    if processes:
        return processes.run(_Work(model, mixture, losses), windows, tally, progress)
    chosen = tally.add if tally else _ignore
    return run_model(model, windows, compute, mixture=mixture, chosen=chosen, progress=progress, losses=losses)


@contextmanager
def processes_of(address: str | None, count: int | None, compute: Compute, windows: int) -> Iterator[Processes | None]:
    """A context with processes of a Ray cluster, each for a window at least; with None where no cluster is asked for.

    Args:
        address: `local` for processes on this machine, `auto` for a cluster that it belongs to, or a cluster's address.
        count: the number of processes; None for one for each GPU if the pass is on one, else for each CPU.
        compute: the device and dtype of the passes.
        windows: how many windows there are.

    Raises:
        RefusedError: Ray is not installed, or there is no such cluster.
    """
    if address is None:
        yield None
        return
    on_gpu = compute.device.type == "cuda"
    with ray_cluster(address, count) as cluster:
        number = min(count or cluster.processes(on_gpu), windows)
        with cluster.actors(_Worker, [(compute,)] * number, on_gpu) as actors:
            yield Processes(cluster, actors)
