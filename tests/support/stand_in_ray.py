"""A stand-in for Ray: its processes are objects in this one, which are sent pickles, and die when they are told to."""

import pickle
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from moemerge.errors import MoemergeError

Thing = TypeVar("Thing")
Reference = Callable[[], Any]


class RayError(Exception):
    """As of Ray: a process is gone."""


class RayTaskError(RayError):
    """As of Ray: a method raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"task: {cause}")
        self.cause = cause


class Ray:
    """What moemerge uses of the module `ray`: a process answers when it is waited for, and dies after so many jobs."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, lives: Sequence[int] = (1000,), cpus: int = 8) -> None:
        self.lives, self.cpus = lives, cpus
        self.made: list[Actor] = []
        self.killed: list[Actor] = []

    def install(self) -> "Ray":
        """Be what `import ray` finds."""
        sys.modules["ray"] = cast("Any", self)
        return self

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2 + [{"Alive": False, "Resources": {"CPU": 4.0}}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def remote(self, kind: Callable[..., Any]) -> Any:
        def make(*arguments: Any) -> "Actor":
            life = self.lives[min(len(self.made), len(self.lives) - 1)]  # the last of them is that of all further ones
            self.made.append(Actor(kind(*sent(arguments)), life))
            return self.made[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def wait(self, references: list[Reference], timeout: float) -> tuple[list[Reference], list[Reference]]:
        assert timeout
        return references[:1], references[1:]

    def get(self, reference: Reference) -> Any:
        return reference()

    def kill(self, actor: "Actor") -> None:
        self.killed.append(actor)


class Actor:
    def __init__(self, made: Any, life: int) -> None:
        self.made, self.life = made, life
        self.check = SimpleNamespace(remote=lambda: lambda: self.answer(made.check, 0))
        self.run = SimpleNamespace(remote=lambda job: lambda: self.answer(lambda: made.run(sent(job)), 1))

    def answer(self, method: Callable[[], Any], cost: int) -> Any:
        self.life -= cost
        if self.life < 0:
            self.life = -1000
            raise RayError("killed")
        try:
            return sent(method())
        except MoemergeError as error:
            raise RayTaskError(sent(error)) from error


def sent(thing: Thing) -> Thing:
    """What another process makes of a thing."""
    return cast("Thing", pickle.loads(pickle.dumps(thing)))  # noqa: S301  its own
