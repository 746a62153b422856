"""Explain errors of the Hub's client to the user, and try again where that may help."""

import re
import socket
import ssl
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Final, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moemerge.checkpoint.files import interrupted
from moemerge.errors import NoSuchModelError, SourceError
from moemerge.sources.reference import Reference

ABSENT: Final = (
    "there is no such folder here, it is not in the Hub's cache, and the Hub cannot be reached. "
    "Check the name, the network, and HF_HUB_OFFLINE."
)
PARTIAL: Final = (
    "only a part of it is in the Hub's cache, and the Hub cannot be reached. Check the network and HF_HUB_OFFLINE."
)
_NOT_FOUND: Final = (
    "there is no such folder here and no such repository on the Hub, or it is private. "
    "Check the name; for a private one log in with `hf auth login`."
)
# Seconds before another try: doubled each time, about three minutes in all.
FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 32.0
_TOLD_WAIT: Final = 2.0
_MOST_TRIES: Final = 11
_FEW_TRIES: Final = 4
_TOO_MANY_REQUESTS: Final = 429
WAIT_STATUSES: Final = frozenset({_TOO_MANY_REQUESTS})
_MAY_PASS: Final = WAIT_STATUSES | {408, 500, 502, 503, 504}
# Errors of HTTP libraries are errors on the way, except for these, which would occur again.
_HTTP_LIBRARIES: Final = {"httpx", "httpx2", "httpcore", "httpcore2", "h11", "urllib3", "requests"}
_USELESS: Final = {"InvalidURL", "UnsupportedProtocol", "InvalidSchema", "MissingSchema", "LocalProtocolError"}
Result = TypeVar("Result")


class Patience:
    """How often something is tried again, and how long to wait before that."""

    def __init__(
        self,
        what: object,
        announce: Callable[[str], None],
        most_tries: int = _MOST_TRIES,
        *,
        may_pass: Callable[[Exception], bool] | None = None,
        statuses: Collection[int] = _MAY_PASS,
    ) -> None:
        """Be patient with the Hub, or with another machine.

        Args:
            what: what messages name when the Hub asks to wait, or when the waits get long.
            announce: called with these messages.
            most_tries: how often something is tried without a success.
            may_pass: whether an error that is no answer of the Hub may not occur the next time; None for the Hub's.
            statuses: those of the Hub's answers after which it is asked again.
        """
        self._what, self._announce, self._most_tries = what, announce, most_tries
        self._may_pass, self._statuses = may_pass or _may_pass, statuses
        self._tries = 0

    def reset(self) -> None:
        """Start counting tries anew after a success."""
        self._tries = 0

    def repeat(self, action: Callable[[], Result]) -> Result:
        """Call a function again until it succeeds; what it raises when another try cannot help is raised as it is."""
        while True:
            try:
                return action()
            except Exception as error:  # noqa: BLE001, PERF203  of several libraries; the loop is for the error
                sleep(self.wait_after(error))

    def wait_after(self, error: Exception) -> float:
        """The seconds to wait before another try.

        Raises:
            Exception: `error` itself, if another try cannot help.
        """
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        answer = getattr(cause, "response", None) if isinstance(cause, HfHubHTTPError) else None
        status = None if answer is None else answer.status_code
        if not (status in self._statuses if status else self._may_pass(error)):
            raise error
        # A Hub that asks to wait will answer later.
        self._tries += 1
        if self._tries >= (_MOST_TRIES if status == _TOO_MANY_REQUESTS else self._most_tries):
            raise error
        why = "too many requests" if status == _TOO_MANY_REQUESTS else f"status {status}" if status else str(error)
        why = (why.splitlines() or [type(error).__name__])[0]
        asked = None if answer is None else seconds_asked(answer.headers)
        if asked is not None:
            self._announce(f"{self._what}: the Hub asks to wait for {asked:.0f} s ({why})")
            return asked
        wait: float = min(FIRST_WAIT * 2 ** (self._tries - 1), _LONGEST_WAIT)
        if wait >= _TOLD_WAIT:
            self._announce(f"{self._what}: {why.rstrip('.')}; trying again in {wait:.0f} s")
        return wait


def patiently(
    what: object,
    announce: Callable[[str], None],
    action: Callable[[], Result],
    statuses: Collection[int] = _MAY_PASS,
) -> Result:
    """Ask the Hub again if it is too busy or fails; a missing network is an error at once."""
    return Patience(what, announce, _FEW_TRIES, may_pass=lambda _error: False, statuses=statuses).repeat(action)


def sleep(seconds: float) -> None:
    """Wait, in any thread, unless the program is interrupted.

    Raises:
        KeyboardInterrupt: the program is interrupted.
    """
    if interrupted.wait(seconds):
        raise KeyboardInterrupt


def seconds_asked(headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait: `Retry-After`, or the Hub's `RateLimit: "api";r=0;t=55`.

    https://huggingface.co/docs/hub/rate-limits
    """
    if match := re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")):
        return float(match[1])
    match = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None


@contextmanager
def explained(reference: Reference, absent: str) -> Iterator[None]:
    """Turn whatever the client raises into a message for the user; its HTTP library differs between its versions."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        is_wrong = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
        kind = NoSuchModelError if is_wrong and not isinstance(error, GatedRepoError) else SourceError
        raise kind(f"{reference}: {_explain(error, reference, absent)}") from error


def _explain(error: BaseException, reference: Reference, absent: str) -> str:  # noqa: PLR0911  one for each error
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return _explain(error.__cause__, reference, absent)  # the Hub did answer
    if isinstance(error, LocalEntryNotFoundError) or is_of_network(error):
        # Newer clients raise IncompleteSnapshotError, which alone has this attribute.
        return PARTIAL if hasattr(error, "snapshot_path") else absent
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {reference.revision or 'main'!r}.{_nearest_revision(reference)}"
    if isinstance(error, GatedRepoError):
        return (
            f"is gated. Accept its terms on {page_of(reference.repo)}, then log in with `hf auth login`; "
            "who has done both may have to wait for the authors."
        )
    if isinstance(error, RepositoryNotFoundError):
        return _NOT_FOUND + _nearest_repository(reference)
    if isinstance(error, HfHubHTTPError):
        said = f", {error.server_message.rstrip('.')}" if error.server_message else ""
        return f"the Hub answered with status {error.response.status_code}{said}. Try again later, or check your token."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"could not be downloaded: {lines[0].rstrip('.')}."


def page_of(repo: str) -> str:
    """The address of a repository's page."""
    return f"{constants.ENDPOINT}/{repo}"


def _nearest_repository(reference: Reference) -> str:
    """A question that names the owner's most similar models, if the Hub lists any."""
    owner, _, name = reference.repo.rpartition("/")
    with suppress(Exception):  # this only helps
        listed = HfApi().list_models(author=owner, limit=200) if owner else HfApi().list_models(search=name, limit=200)
        names = {model.id.rpartition("/")[2]: model.id for model in listed}
        return _question([names[near] for near in get_close_matches(name, names)])
    return ""


def _nearest_revision(reference: Reference) -> str:
    with suppress(Exception):
        refs = HfApi().list_repo_refs(reference.repo)
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        return _question(get_close_matches(reference.revision or "main", names) or names[:3])
    return ""


def _question(names: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else ""


def is_of_network(error: BaseException) -> bool:
    """Whether the network failed or must not be used: below every HTTP library lies an error of its socket."""
    return any(isinstance(one, ConnectionError | TimeoutError | socket.gaierror) for one in chain(error))


def _may_pass(error: Exception) -> bool:
    """Whether an error that is no answer of the Hub may not occur the next time."""
    if any(isinstance(one, ssl.SSLCertVerificationError) for one in chain(error)):
        return False
    library = type(error).__module__.partition(".")[0]
    return is_of_network(error) or (library in _HTTP_LIBRARIES and type(error).__name__ not in _USELESS)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the error it was raised from, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
