"""What the Hub's client raises: what it means to the user, and whether it is worth another try."""

import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from moemerge.errors import SourceError
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
_TOO_MANY_REQUESTS: Final = 429
_MAY_PASS: Final = {408, _TOO_MANY_REQUESTS, 500, 502, 503, 504}
Result = TypeVar("Result")


class Patience:
    """How often something is tried again, and how long it is waited before that."""

    def __init__(self, what: object, announce: Callable[[str], None]) -> None:
        """Speak of `what` when the Hub asks to wait."""
        self._what, self._announce = what, announce
        self._tries = 0

    def reset(self) -> None:
        """Something was achieved."""
        self._tries = 0

    def wait_after(self, error: Exception) -> float:
        """Seconds to wait before another try.

        Raises:
            Exception: `error`, if another try is not worth it.
        """
        answer = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
        status = None if answer is None else answer.status_code
        if self._tries + 1 >= _MOST_TRIES or (status is not None and status not in _MAY_PASS):
            raise error
        self._tries += 1
        why = "too many requests" if status == _TOO_MANY_REQUESTS else f"status {status}" if status else str(error)
        asked = None if answer is None else _seconds_asked(answer.headers)
        if asked is not None:
            self._announce(f"{self._what}: the Hub asks to wait for {asked:.0f} s ({why})")
            return asked
        wait: float = min(FIRST_WAIT * 2 ** (self._tries - 1), _LONGEST_WAIT)
        if wait >= _TOLD_WAIT:
            self._announce(f"{self._what}: {why.splitlines()[0].rstrip('.')}; trying again in {wait:.0f} s")
        return wait


def patiently(what: object, announce: Callable[[str], None], action: Callable[[], Result]) -> Result:
    """Do something again as long as the Hub says that there were too many requests, and to wait."""
    patience = Patience(what, announce)
    while True:
        try:
            return action()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:  # noqa: PERF203  the loop is for the error
            answer = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            if not isinstance(answer, HfHubHTTPError) or answer.response.status_code != _TOO_MANY_REQUESTS:
                raise
            sleep(patience.wait_after(answer))


def sleep(seconds: float) -> None:
    """Wait, in any thread, unless the program is interrupted.

    Raises:
        KeyboardInterrupt: it is.
    """
    if interrupted.wait(seconds):
        raise KeyboardInterrupt


def _seconds_asked(headers: Mapping[str, str]) -> float | None:
    """What the answer says: `Retry-After`, or the Hub's `RateLimit: "api";r=0;t=55`.

    https://huggingface.co/docs/hub/rate-limits
    """
    if match := re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")):
        return float(match[1])
    match = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None


@contextmanager
def explained(reference: Reference, absent: str) -> Iterator[None]:
    """Turn whatever the client raises into a line for the user; its HTTP library differs between its versions."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{reference}: {_explain(error, reference, absent)}") from error


def _explain(error: BaseException, reference: Reference, absent: str) -> str:  # noqa: PLR0911  one for each error
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return _explain(error.__cause__, reference, absent)  # the Hub did answer
    if isinstance(error, LocalEntryNotFoundError) or _is_of_network(error):
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
    """A question with the owner's models that are called alike, if the Hub names any."""
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


def _is_of_network(error: BaseException | None) -> bool:
    """Whether the network failed, or is not to be used: below every HTTP library lies an error of its socket."""
    while error and not isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None
