"""The tree of errors; the library raises them, the command line prints them.

MoemergeError                  exit code 1: something failed
├── CheckpointError            a model file is damaged or is not what it says
│   ├── DamagedModelError      it belongs to the weights of a model that was named
│   └── TooLargeError          a number in it is infinite in the output's dtype
├── SourceError                a model cannot be reached: no network, no access
│   └── NoSuchModelError       exit code 2: a name leads to no model
├── OutputError                the target cannot be written: disk full
│   └── BusyError              another process is writing it
├── RouterError                router weights cannot be computed
├── PublishError               the Hub does not take a model
└── RefusedError               exit code 2: the config or the command has to change
    ├── ConfigError            the YAML, every problem with its place
    └── IncompatibleError      the models cannot be merged, every reason
"""

from collections.abc import Sequence
from typing import Any, Final

from moemerge.printable import printable

_MOST_BYTES: Final = 3500
# More than there are output families, each with its reasons.
_MOST_PROBLEMS: Final = 30
_PROBLEM_BYTES: Final = 600


class MoemergeError(Exception):
    """Root of everything that moemerge raises on purpose; its text is meant for the user, short and safe to print."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        """Keep a message, made safe to print whatever file and tensor names it quotes."""
        super().__init__(printable(str(message), _MOST_BYTES))

    def __reduce__(self) -> tuple[Any, ...]:
        """Give what another process makes the same error of, whatever arguments its kind takes."""
        return _restored, (type(self), str(self), self.__dict__)


class CheckpointError(MoemergeError):
    """A model file is damaged, truncated, hostile, or not a checkpoint."""


class DamagedModelError(CheckpointError):
    """The weights of a model are damaged or incomplete; `reference` is the name that it was given by."""

    def __init__(self, reference: str, message: str) -> None:
        self.reference = reference
        super().__init__(message)


class TooLargeError(CheckpointError):
    """A finite number of a model is infinite in the output's dtype; `what` says which, the message also what to do."""

    def __init__(self, what: str, advice: str) -> None:
        self.what = what
        super().__init__(f"{what}. {advice}.")


class SourceError(MoemergeError):
    """A model reference cannot be resolved or reached."""


class NoSuchModelError(SourceError):
    """A name leads to no model: there is none, or it is something else."""

    exit_code = 2


class OutputError(MoemergeError):
    """The output cannot be written."""


class BusyError(OutputError):
    """Another process is writing the same output."""


class RouterError(MoemergeError):
    """Router weights cannot be computed from what was given."""


class PublishError(MoemergeError):
    """The Hub does not take a model: token, network, quota, or it holds something else than was sent."""


class RefusedError(MoemergeError):
    """The request has to change before it can be met."""

    exit_code = 2


class _ListedError(RefusedError):
    """A refusal that lists every reason."""

    def __init__(self, headline: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"  - {printable(problem, _PROBLEM_BYTES)}" for problem in problems[:_MOST_PROBLEMS]]
        more = [f"  - and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        super().__init__("\n".join([headline, *shown, *more]))


class ConfigError(_ListedError):
    """The merge config is wrong; `problems` holds every problem with its address."""


class IncompatibleError(_ListedError):
    """The models cannot be merged; `problems` holds every reason."""


def _restored(kind: type[MoemergeError], message: str, state: dict[str, Any]) -> MoemergeError:
    error = kind.__new__(kind)
    MoemergeError.__init__(error, message)
    error.__dict__.update(state)
    return error
