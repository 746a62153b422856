"""What a process of a Ray cluster runs, and what is said of one that fails."""

import inspect
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from moemerge.errors import MoemergeError, RefusedError


@contextmanager
def files_of_all_machines() -> Iterator[None]:
    """A context, in a process of a cluster, that says of a file which is not there what machine lacks it.

    Raises:
        RefusedError: a file is not there.
    """
    try:
        yield
    except MoemergeError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise RefusedError(
            f"--ray: {platform.node()} has no {error.__cause__.filename}. Every process reads the models itself: they "
            "have to be at the same paths on all machines, as on a file system that these share."
        ) from error


def process_of(kind: type, folder: Path) -> type:
    """A class of processes with the methods of `kind`, which raise nothing but errors of moemerge.

    A process enters a folder, if the machine has it, so that relative paths lead to the same files. Its object is made
    at the first call of a method, so that what is raised then is raised as by the method.
    """

    def begin(self: Any, *arguments: Any) -> None:
        with suppress(OSError):  # paths that do not count from it are found all the same
            os.chdir(folder)
        self.object, self.arguments = None, arguments

    def told(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *given: Any) -> Any:
            try:
                if self.object is None:
                    self.object = kind(*self.arguments)
                return method(self.object, *given)
            except MoemergeError:
                raise
            except Exception as error:
                raise MoemergeError(
                    f"--ray: a process on {platform.node()} failed ({type(error).__name__}: {said(error)}). If that "
                    "machine lacks nothing, this is a fault in moemerge: please report it, with what --debug shows."
                ) from error

        return call

    methods = {name: told(method) for name, method in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}
    return type(kind.__name__, (), {"__init__": begin, **methods})


def said(error: Exception | None) -> str:
    """What an error says, in a line; of a traceback in it, which `--debug` shows, the last."""
    text = str(error).strip()
    if re.search(r"\n +File |ray::\S+\(\)", text):
        text = text.splitlines()[-1]
    return f"{' '.join(text.split()):.1000}"


def explain_death(error: Exception | None, who: str) -> MoemergeError:
    """The error for processes that are gone, whose number is in `who`, by what Ray said of the last of them.

    One that could not even begin had other packages than this one, since its object is made later.
    """
    if not getattr(error, "actor_init_failed", False):
        return MoemergeError(f"{who} of the Ray cluster died: {said(error)}")
    machine = re.search(r"\bip=([^,)\s]+)", str(error))
    return RefusedError(
        f"--ray: no process can begin on {machine[1] if machine else 'another machine'} ({said(error)}). Install there "
        "what is installed here: the same moemerge, Python and other packages."
    )
