"""Independent jobs in a few threads, stopped together when one fails or the user gives up."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Final, TypeVar

from moemerge.checkpoint.copy import Report

# Jobs wait for the disk, not the processor: more threads than this queue behind each other.
MAX_THREADS: Final = 4
Result = TypeVar("Result")


class _StoppedError(Exception):
    """Another thread failed, or the user gave up."""


def run_jobs(jobs: Iterable[Callable[[Report], Result]], report: Report) -> list[Result]:
    """The results of jobs, in their order; the first failure stops the others and is raised.

    Args:
        jobs: each calls what it is given with the number of bytes done, often enough to be stopped there.
        report: called with these numbers, from one thread at a time.
    """
    stop = threading.Event()
    lock = threading.Lock()

    def report_or_stop(nbytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            report(nbytes)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        running = [pool.submit(job, report_or_stop) for job in jobs]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            failures = [error for job in done if (error := job.exception()) and not isinstance(error, _StoppedError)]
            if failures:
                raise failures[0]
            return [job.result() for job in running]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
