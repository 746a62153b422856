"""Joining a Ray cluster: this machine's processes, or one that is there."""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Final

from moemerge.cluster import Cluster
from moemerge.errors import RefusedError
from moemerge.packages import importing

_LOCAL: Final = "local"
_AUTO: Final = "auto"
_HOW: Final = (
    "`--ray local` begins processes on this machine; `--ray auto` finds the cluster that it belongs to, which "
    "`ray start --head` begins; `--ray HOST:PORT` leads to another one"
)
# Seconds for the head of a cluster to take a connection: Ray by itself asks for minutes.
_PATIENCE: Final = 10
# In what Ray says of processes that moemerge has ended, because one failed, and of that one: moemerge says it shorter.
_KNOWN: Final = ("killed by `ray.kill`", "Traceback (most recent call last)")


def import_ray() -> Any:
    """Import Ray, and return its module.

    Raises:
        RefusedError: it is not installed, or lacks something.
    """
    with importing("ray", "--ray: ray is needed: pip install 'moemerge[ray]'."):
        import ray
    return ray


@contextmanager
def ray_cluster(address: str, count: int | None) -> Iterator[Cluster]:
    """A context that is connected to a Ray cluster; a connection that was there is used, and stays.

    Args:
        address: `local` for processes on this machine, `auto` for a cluster that it belongs to, or a cluster's address.
        count: the number of processes, if it is known: for so many a cluster that is begun by `local` has room, even on
            a machine that has fewer CPUs.

    Raises:
        RefusedError: Ray is not installed, or there is no such cluster.
    """
    ray = import_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield Cluster(ray)
        return
    with _results_apart():
        _connect(ray, address, count)
        try:
            yield Cluster(ray)
        finally:
            said = _RaysNews(sys.stderr)  # by this thread: what was held back as repeated
            with redirect_stdout(said), redirect_stderr(said):
                ray.shutdown()


class _RaysNews:
    """A stream for what Ray says, without what moemerge says shorter."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._drops = stream, False

    def write(self, text: str) -> int:
        """Write what is news."""
        self._drops = any(known in text for known in _KNOWN) or (self._drops and text == "\n")
        return len(text) if self._drops else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _ApartFromRay:
    """A standard stream, to which Ray's threads do not write."""

    def __init__(self, stream: Any, news: _RaysNews) -> None:
        self._stream, self._news = stream, news

    def write(self, text: str) -> int:
        """Write what a command says; what Ray says goes to another stream."""
        by_ray = threading.current_thread().name.startswith("ray_")
        return int((self._news if by_ray else self._stream).write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _results_apart() -> Iterator[None]:
    """A context in which Ray's messages, as of a process that died, are not printed among a command's results."""
    given = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_ApartFromRay(stream, _RaysNews(given[1])) for stream in given)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = given


def check_address(address: str) -> None:
    """Refuse an address that no cluster can have, or where nothing answers.

    Raises:
        RefusedError: says what is expected.
    """
    if address in {_LOCAL, _AUTO}:
        return
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d{1,5})", address)
    if match is None:
        raise RefusedError(f"--ray {address}: is neither local nor auto nor HOST:PORT. {_HOW}.")
    try:
        socket.create_connection((match[1], int(match[2])), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise RefusedError(
            f"--ray {address}: nothing answers there ({error}). Name machine and port of `ray start --head --port`, "
            "6379 if no other was given, and look there with `ray status`."
        ) from error


def _connect(ray: Any, address: str, count: int | None) -> None:
    check_address(address)
    cpus = None if count is None else max(count, len(os.sched_getaffinity(0)))
    options = {"num_cpus": cpus, "include_dashboard": False} if address == _LOCAL else {}
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError) as error:
        said = "no Ray runs on this machine" if address == _AUTO else f"it cannot be joined ({_short(error, 200)})"
        raise RefusedError(f"--ray {address}: {said}. {_HOW}.") from error
    except (OSError, RuntimeError) as error:  # a folder whose path is too long for sockets, another version of Ray
        raise RefusedError(f"--ray {address}: Ray does not begin: {_short(error, 400)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ends)  # which Ray has taken for itself


def _short(error: Exception, length: int) -> str:
    return " ".join(str(error).split())[:length]
