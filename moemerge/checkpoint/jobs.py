"""A pool of threads for independent jobs, stopped together when one fails or the user gives up."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from moemerge.checkpoint.copy import Report

if TYPE_CHECKING:
    from typing_extensions import Self

# Jobs wait for the disk, not the processor: more threads than this queue behind each other.
MAX_THREADS: Final = min(4, os.cpu_count() or 1)
CONNECTIONS: Final = 8
"""How many ranges of remote files to read at once: a single connection seldom uses all the bandwidth."""
Result = TypeVar("Result")


class _StoppedError(Exception):
    """Another thread failed, or the user gave up."""


class JobPool:
    """A context that ends when all its jobs are done; the first failure stops the others and is raised."""

    def __init__(self, report: Report, threads: int = MAX_THREADS) -> None:
        """Start a pool of `threads` threads.

        Args:
            report: called with what the jobs report, from one thread at a time.
            threads: how many jobs run at once.
        """
        self._report = report
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._pool = ThreadPoolExecutor(threads)
        self._futures: list[Future[Any]] = []

    def start(self, job: Callable[[Report], Result]) -> Future[Result]:
        """Run `job` in a thread; it calls its argument with the bytes done, often enough to be stopped there."""
        future = self._pool.submit(job, self._report_or_stop)
        self._futures.append(future)
        return future

    def check(self) -> None:
        """Raise the error of a job that has failed."""
        for future in self._futures:
            error = future.exception() if future.done() and not future.cancelled() else None
            if error and not isinstance(error, _StoppedError):
                raise error

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if kind is None:
                wait(self._futures, return_when=FIRST_EXCEPTION)
                self.check()
                finished = True
        finally:
            if not finished:
                self._stop.set()
            self._pool.shutdown(cancel_futures=True)

    def _report_or_stop(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._report(nbytes)
