"""Processes of a Ray cluster, on one machine or several; `moemerge.joining` connects to it."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Timer
from typing import Any, Final, TypeVar

from moemerge.errors import MoemergeError, RefusedError
from moemerge.ray_process import explain_death, process_of, said

# Of a process that was killed, as for want of memory.
_RESTARTS: Final = 2
# Not 0: a head that was given no CPUs is left alone.
_RESERVED_CPUS: Final = 0.1
_WAIT_SECONDS: Final = 0.5
# Seconds for processes to begin, before it is said what they wait for.
_PATIENCE: Final = 10.0
_log: Final = logging.getLogger(__name__)
Job = TypeVar("Job")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    ray: Any
    """The module `ray`."""

    def processes(self, of_gpu: bool, most: int | None = None) -> int:
        """How many processes the cluster has room for: one for each GPU, or for each CPU; at least one.

        Args:
            of_gpu: whether each process needs a GPU.
            most: the largest number that is wanted, if any.
        """
        held = int(self.ray.cluster_resources().get("GPU" if of_gpu else "CPU", 1))
        return max(1, held if most is None else min(most, held))

    @property
    def machines(self) -> int:
        """How many machines of the cluster have CPUs for processes."""
        return sum(node["Alive"] and "CPU" in node["Resources"] for node in self.ray.nodes())

    @contextmanager
    def actors(self, kind: type, arguments: Sequence[tuple[Any, ...]], of_gpu: bool) -> Iterator[list[Any]]:
        """A context with processes, each with an object of `kind` that is made of its own `arguments`.

        They are spread over the machines, in the folder of this process where a machine has it. Each has as many
        threads as there are CPUs for it, but reserves next to none, so that they have room on machines of any size, and
        on those that are left if one is lost. A process that dies is begun anew, twice at most, and is asked again for
        what it had not finished.

        Raises:
            RefusedError: the cluster has not so many GPUs, or CPUs.
        """
        threads = max(1, int(self.ray.cluster_resources().get("CPU", 1)) // max(len(arguments), self.machines))
        options = {
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            "max_restarts": _RESTARTS,
            # Until it is begun anew: a lost machine is known to be lost only after many calls to it have failed.
            "max_task_retries": -1,
        }
        needs = {"GPU": 1.0} if of_gpu else {}
        with self._processes(kind, len(arguments), {**needs, "CPU": _RESERVED_CPUS}, **options) as begin:
            yield [begin(*given) for given in arguments]

    def dealt(
        self,
        kind: type,
        arguments: tuple[Any, ...],
        jobs: Iterable[Job],
        count: int,
        waiting: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[Job, Any], None, None]:
        """Have jobs done by processes, spread over the machines; yields each with its result when it is done.

        A process with nothing to do gets the next job. The job of one that dies is done by another, and a new process
        takes its place, twice for each at most.

        Args:
            kind: of each process, a class of objects with two methods: `check()` is called before anything else, and
                `run(job)` for each job.
            arguments: what the objects are made of.
            jobs: what to do.
            count: the number of processes.
            waiting: called now and then; may raise to stop the work.

        Raises:
            RefusedError: the cluster has no room for so many processes.
            MoemergeError: a method raised it, or another error, or all processes died.
        """
        if not (left := deque(jobs)):
            return
        count = min(count, len(left))
        with self._processes(kind, count, {"CPU": 1.0}) as begin:
            spares = (begin(*arguments) for _ in range(count * _RESTARTS))
            yield from self._deal([begin(*arguments) for _ in range(count)], spares, left, waiting)

    @contextmanager
    def _processes(
        self, kind: type, count: int, needs: Mapping[str, float], **options: Any
    ) -> Iterator[Callable[..., Any]]:
        """A context with a function that begins processes, spread over the machines; they end with it.

        Where other work holds what they need, a warning says so if they have not begun after some seconds.

        Args:
            kind: the class of the object that each has, which is made of the function's arguments.
            count: how many are begun at first.
            needs: how much each of them needs of the cluster's CPUs and GPUs.
            options: Ray's further options for each.

        Raises:
            RefusedError: the cluster has not so many GPUs, or CPUs.
        """
        self._check_room(count, needs)
        made = self.ray.remote(process_of(kind, Path.cwd())).options(
            num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), scheduling_strategy="SPREAD", **options
        )
        actors: list[Any] = []
        ready: list[Any] = []

        def begin(*arguments: Any) -> Any:
            actors.append(made.remote(*arguments))
            ready.append(actors[-1].__ray_ready__.remote())
            return actors[-1]

        free = self.ray.available_resources()
        timer = Timer(_PATIENCE, partial(self._tell_what_is_missing, ready, needs))
        timer.daemon = True
        if any(free.get(of, 0) < count * each for of, each in needs.items()):
            timer.start()
        try:
            yield begin
        finally:
            timer.cancel()
            if timer.is_alive():
                timer.join()
            for actor in actors:
                self.ray.kill(actor)

    def _tell_what_is_missing(self, ready: Sequence[Any], needs: Mapping[str, float]) -> None:
        """Warn of processes that have not begun, if any has not."""
        _, waiting = self.ray.wait(list(ready), num_returns=len(ready), timeout=0)
        if waiting:
            free, held = self.ray.available_resources(), self.ray.cluster_resources()
            _log.warning(
                "--ray: %d of %d processes wait for %s each; the cluster has %s. They begin when other work ends "
                "(`ray status` shows it); --workers asks for fewer.",
                len(waiting),
                len(ready),
                " and ".join(f"{each:g} {of}" for of, each in needs.items()),
                " and ".join(f"{held[of]:g} {of}s ({free.get(of, 0):g} free)" for of in needs),
            )

    def _deal(
        self, first: Iterable[Any], spares: Iterator[Any], left: deque[Job], waiting: Callable[[], None]
    ) -> Iterator[tuple[Job, Any]]:
        """Deal out what is `left` to the `first` processes, and to spare ones in the places of those that die."""
        # What each process is at, by the reference of its result: its check, or a job.
        busy: dict[Any, tuple[Any, list[Job]]] = {actor.check.remote(): (actor, []) for actor in first}
        idle: list[Any] = []
        died: Exception | None = None
        while left or any(jobs for _, jobs in busy.values()):
            while left and idle:
                actor, job = idle.pop(), left.popleft()
                busy[actor.run.remote(job)] = (actor, [job])
            if not busy:
                raise explain_death(died, "all processes")
            done, _ = self.ray.wait(list(busy), timeout=_WAIT_SECONDS)
            waiting()
            for reference in done:
                actor, jobs = busy.pop(reference)
                try:
                    result = self._get(reference)
                except self.ray.exceptions.RayError as error:
                    died = error
                    left.extendleft(jobs)
                    busy |= {spare.check.remote(): (spare, []) for spare in islice(spares, 1)}
                else:
                    idle.append(actor)
                    yield from ((job, result) for job in jobs)

    def _get(self, reference: Any) -> Any:
        """The result behind a reference; raises what its method raised."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoemergeError):
                raise error.cause from error
            what = f"{type(error.cause).__name__}: {said(error.cause)}"
            raise MoemergeError(f"a process of the Ray cluster failed: {what}") from error

    def _check_room(self, count: int, needs: Iterable[str]) -> None:
        for kind in needs:
            room = int(self.ray.cluster_resources().get(kind, 0))
            if count > room:
                advice = f"Ask for {room} at most." if room else f"Add a machine that has {kind}s."
                raise RefusedError(
                    f"--workers {count}: the cluster has {room} {kind}s, and each process takes one. {advice}"
                )

    def results(self, waiting: list[Any], progress: Callable[[int, int], None] = lambda _done, _all: None) -> list[Any]:
        """Wait for results, in the order in which they were asked for.

        Args:
            waiting: the references that remote calls returned.
            progress: called with the number of results that are there, and all of them.

        Raises:
            MoemergeError: what was called raised it, or a process failed, and so did those that took its place.
        """
        left, found = list(waiting), dict[Any, Any]()
        try:
            while left:
                progress(len(waiting) - len(left), len(waiting))
                done, left = self.ray.wait(left)
                found |= {reference: self._get(reference) for reference in done}  # what fails is raised at once
        except self.ray.exceptions.RayError as error:
            raise explain_death(error, "a process") from error
        progress(len(waiting), len(waiting))
        return [found[reference] for reference in waiting]
