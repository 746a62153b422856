"""A lock for objects that are sent to other processes."""

import threading
from typing import Any


class OwnLock:
    """A lock between threads, as a context; a copy in another process is a lock of its own, and open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """Give what another process makes the lock of: nothing but its kind."""
        return OwnLock, ()
