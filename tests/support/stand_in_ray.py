"""A stand-in for Ray: its processes are objects in this one, which are sent pickles, and die when they are told to."""

import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
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
    """What moemerge uses of the module `ray`: a process answers when it is waited for, and dies after so many calls.

    One that may be begun again is, and lives as long as the next one would.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, lives: Sequence[int] = (1000,), cpus: int = 8, free: int | None = None) -> None:
        self.lives, self.cpus, self.free = list(lives), cpus, cpus if free is None else free
        self.made: list[Actor] = []
        self.killed: list[Actor] = []
        self.asked = 0

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

    def available_resources(self) -> dict[str, float]:
        return {"CPU": float(self.free)} if self.free else {}

    def remote(self, kind: Callable[..., Any]) -> Any:
        def begin(options: Mapping[str, Any], arguments: Sequence[Any]) -> "Actor":
            self.made.append(Actor(self, lambda: kind(*copied(arguments)), options.get("max_restarts", 0)))
            return self.made[-1]

        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda *arguments: begin(options, arguments))
        )

    def life(self) -> int:
        """That of the next process; the last of them is that of all further ones."""
        return self.lives.pop(0) if len(self.lives) > 1 else self.lives[0]

    def put(self, value: Any) -> Any:
        return value

    def wait(
        self, references: list[Reference], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Reference], list[Reference]]:
        del timeout
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Reference) -> Any:
        return reference()

    def kill(self, actor: "Actor") -> None:
        self.killed.append(actor)


class Actor:
    """A process, whose methods have a method `remote` that gives a reference to their result."""

    def __init__(self, ray: Ray, make: Callable[[], Any], restarts: int) -> None:
        self.ray, self.make, self.restarts = ray, make, restarts
        self.made, self.life = make(), ray.life()

    def __getattr__(self, name: str) -> Any:
        if name == "__ray_ready__":
            return SimpleNamespace(remote=lambda: lambda: True)
        if name[0] == "_":
            raise AttributeError(name)

        def ask(*arguments: Any) -> Reference:
            self.ray.asked += 1
            return lambda: self.answer(name, copied(arguments))

        return SimpleNamespace(remote=ask)

    def answer(self, name: str, arguments: Sequence[Any]) -> Any:
        self.life -= name != "check"
        if self.life < 0:
            if not self.restarts:
                self.life = -1000
                raise RayError("killed")
            self.made, self.life, self.restarts = self.make(), self.ray.life(), self.restarts - 1
            return self.answer(name, arguments)
        try:
            return copied(getattr(self.made, name)(*arguments))
        except MoemergeError as error:
            raise RayTaskError(sent(error)) from error


def copied(thing: Thing) -> Thing:
    """What another process makes of a thing; the thing itself if only Ray's pickles can hold it."""
    try:
        return sent(thing)
    except (AttributeError, TypeError, pickle.PicklingError):
        return thing


def sent(thing: Thing) -> Thing:
    """What another process makes of a thing."""
    return cast("Thing", pickle.loads(pickle.dumps(thing)))  # noqa: S301  its own
