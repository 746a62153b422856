"""What a test can make go wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from threading import RLock
from typing import Literal

from tests.support.hub_server.answer import AnswerError
from tests.support.hub_server.counting import Call

Wrong = Literal["short", "long", "shifted", "whole"]
"""How the body of a file can be other than asked: less than asked for, more, another range, or no range at all."""


@dataclass
class Fault:
    """Something that happens to the next requests that fit."""

    pattern: str
    """Of the path as `Call` has it; `*` spans folders."""
    times: int
    method: str = "*"
    host: str = "*"
    error: AnswerError | None = None
    action: Callable[[], object] | None = None
    cut: bool = False
    """The connection ends within the file's body."""
    cut_after: int | None = None
    """After this many bytes of it; None is half of it."""
    wrong: Wrong | None = None

    @property
    def in_body(self) -> bool:
        return self.cut or self.wrong is not None

    def fits(self, call: Call) -> bool:
        return (
            self.times > 0
            and fnmatchcase(call.path, self.pattern)
            and fnmatchcase(call.method, self.method)
            and fnmatchcase(call.host, self.host)
        )


@dataclass
class Faults:
    """The faults that are still to come."""

    waiting: list[Fault] = field(default_factory=list)
    lock: RLock = field(default_factory=RLock)

    def meet(self, call: Call) -> None:
        """Let what is to happen before a request's answer happen: every action that fits, and the first error."""
        with self.lock:
            due = [fault for fault in self.waiting if not fault.in_body and fault.fits(call)]
            errors = [fault for fault in due if fault.error]
            for fault in (happening := [fault for fault in due if fault.action] + errors[:1]):
                fault.times -= 1
        for fault in happening:
            if fault.action:
                fault.action()
            if fault.error:
                raise fault.error

    def take_in_body(self, call: Call) -> Fault | None:
        """What is to happen to the body of a file; it has then happened once."""
        with self.lock:
            for fault in self.waiting:
                if fault.in_body and fault.fits(call):
                    fault.times -= 1
                    return fault
        return None
