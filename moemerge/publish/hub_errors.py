"""Explain the Hub's answers and the client's errors to the user who publishes, with what to do next."""

import re
from http import HTTPStatus
from typing import Any, Final

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RevisionNotFoundError

from moemerge.errors import PublishError, RefusedError
from moemerge.publish.repository import Account, Repository, may_not_write
from moemerge.sources.retries import chain, is_of_network, seconds_asked

_NO_TOKEN: Final = "pushing needs a token of the Hub, and there is none. Log in with `hf auth login`, or set HF_TOKEN."  # noqa: S105  no token
_BAD_TOKEN: Final = (
    "the Hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN to one that is valid."  # noqa: S105
)
_NETWORK: Final = "the Hub cannot be reached. Check the network and HF_HUB_OFFLINE, and try again."
_FULL_STATUSES: Final = frozenset({402, 403, 413, 507})
_REFUSALS: Final = frozenset({400, 409})
_FULL: Final = re.compile(r"storage|quota|size limit|too large", re.IGNORECASE)

Explained = tuple[type[PublishError | RefusedError], str]


def explain(error: BaseException, repo: Repository, account: Account) -> Explained:
    """Give the kind of an error and a line about it, without the repository's name."""
    causes = list(chain(error))
    if any(isinstance(one, LocalTokenNotFoundError) for one in causes):
        return PublishError, _NO_TOKEN
    if isinstance(error, HFValidationError):
        return RefusedError, f"is not a repository's name: {str(error).rstrip('.')}."
    if answered := next((one for one in causes if getattr(one, "response", None) is not None), None):
        return _explain_answer(answered, repo, account)
    if is_of_network(error):
        return PublishError, _NETWORK
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return PublishError, f"could not be sent: {text.rstrip('.')}."


def _explain_answer(error: BaseException, repo: Repository, account: Account) -> Explained:
    """Explain an error that carries the Hub's response."""
    response: Any = getattr(error, "response", None)
    status = int(response.status_code)
    said = getattr(error, "server_message", None) or response.headers.get("X-Error-Message") or ""
    said = " ".join(said.split()).rstrip(".")
    quoted = f": {said}" if said else ""
    kind: type[PublishError | RefusedError] = PublishError
    if not str(response.url).startswith(constants.ENDPOINT):
        text = f"the Hub's storage answered with status {status}{quoted}. Try again later."
    elif status == HTTPStatus.UNAUTHORIZED:
        text = _BAD_TOKEN
    elif status in _FULL_STATUSES and _FULL.search(said):
        text = f"the Hub has no room for it: {said}. Make room, or push to another account."
    elif status == HTTPStatus.TOO_MANY_REQUESTS:
        seconds = seconds_asked(response.headers)
        text = f"the Hub asks for fewer requests. Try again {f'in {seconds:.0f} s' if seconds else 'later'}."
    elif status == HTTPStatus.PRECONDITION_FAILED:
        text = "somebody changed the repository in the meantime."
    elif status == HTTPStatus.FORBIDDEN:
        kind, text = RefusedError, may_not_write(account, quoted)
    elif isinstance(error, RevisionNotFoundError):
        kind, text = RefusedError, f"the repository has no revision {repo.revision or 'main'!r}."
    elif status in _REFUSALS:
        kind, text = RefusedError, f"the Hub refuses it{quoted}."
    else:
        text = f"the Hub answered with status {status}{quoted}. Try again later."
    return kind, text
