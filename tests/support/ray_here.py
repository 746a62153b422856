"""A stand-in for Ray in this process: objects in place of processes, which may die; results are copied."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from moemerge.cluster import Cluster
from moemerge.errors import MoemergeError
from tests.support.stand_in_ray import RayError, RayTaskError


class RayHere:
    """What `Cluster` needs of the module `ray`."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, dies_at: int | None = None) -> None:
        """Let one process die when it is asked for the time of this number."""
        self.dies_at, self.asked, self.made, self.killed = dies_at, 0, 0, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.cluster_resources()}]

    def remote(self, kind: type) -> Any:
        def begin(*arguments: Any) -> Any:
            self.made += 1
            return _Actor(self, lambda: kind(*arguments))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=begin))

    def kill(self, _actor: Any) -> None:
        self.killed += 1

    def put(self, value: Any) -> Any:
        return value

    def wait(self, waiting: list[Any]) -> tuple[list[Any], list[Any]]:
        return waiting[:1], waiting[1:]

    def get(self, reference: "_Reference") -> Any:
        if isinstance(reference.result, Exception):
            raise RayTaskError(reference.result)
        return reference.result


class _Reference:
    """To a result; as Ray's, it can be a key."""

    def __init__(self, result: Any) -> None:
        self.result = result


class _Actor:
    def __init__(self, ray: RayHere, make: Callable[[], Any]) -> None:
        self._ray, self._make, self._made = ray, make, make()

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any) -> _Reference:
            self._ray.asked += 1
            if self._ray.asked == self._ray.dies_at:
                self._made = self._make()  # as Ray does, which asks it again
            try:
                return _Reference(copy.deepcopy(getattr(self._made, name)(*arguments)))
            except MoemergeError as error:  # which `get` raises
                return _Reference(error)

        return SimpleNamespace(remote=ask)


@contextmanager
def cluster_here(ray: RayHere) -> Iterator[Cluster]:
    yield Cluster(ray)
