"""Object stores, such as S3, through `fsspec`: what a folder there holds, and what their errors mean.

Credentials and addresses are those that fsspec's implementation finds in the environment, for S3 `AWS_ACCESS_KEY_ID`,
`AWS_PROFILE`, `AWS_ENDPOINT_URL` and so on.
"""

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import IO, Any, Final

from moemerge.errors import MoemergeError, NoSuchModelError, SourceError
from moemerge.packages import need, why_not_imported
from moemerge.printable import printable
from moemerge.sources.reference import STORES, Location
from moemerge.sources.remote_weights import TEMPLATES
from moemerge.sources.retries import chain, is_of_network

# What sets an object apart from one that takes its place, by store: S3, Google's, a folder.
_STATE: Final = ("ETag", "etag", "generation", "md5Hash", "ino", "mtime", "created")
_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {"file": {"auto_mkdir": True}}
_NO_CREDENTIALS: Final = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
     "TokenRetrievalError", "SSOTokenLoadError", "DefaultCredentialsError", "RefreshError"}
)  # fmt: skip
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, as for the `aws` command; a public bucket is "
    "read with FSSPEC_S3_ANON=true",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default login`",
    "file": "the permissions of the folder",
}
PART_BYTES: Final = 16 * 2**20
"""A large file is sent to S3 in parts of so many bytes."""
PARTS_AT_ONCE: Final = 4
"""So many of them are in memory."""
# Errors of botocore, aiohttp and fsspec on the way; those of sockets are below most of them.
_ON_THE_WAY: Final = frozenset(
    {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "FSTimeoutError"}
)
# What s3fs makes of the answers 500 and 503, and of answers that it does not know.
_BUSY: Final = frozenset({errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO)})


_NO_FOLDER: Final = {
    errno.ENOENT: "the folder cannot be made there, or was removed",
    errno.EEXIST: "is a file, not a folder",
    errno.ENOTDIR: "lies in a file, not in a folder",
}


@dataclass(frozen=True)
class Stored:
    """An object of a store, as it was listed."""

    nbytes: int
    identity: str
    """A value, such as a hash, that differs for any other content."""


class StoreFolder:
    """A folder of an object store, as it was when it was listed."""

    def __init__(self, location: Location) -> None:
        """List the folder.

        Raises:
            RefusedError: a package is needed for this kind of store.
            NoSuchModelError: there is no such bucket.
            SourceError: the store cannot be reached, or refuses.
        """
        self.location, self.gguf = replace(location, gguf=""), location.gguf
        if package := STORES[location.kind]:
            need(package, f"To reach {location}")
        with explained(self.location):
            self.files: Mapping[str, Stored] = self._list()
        self._listed = True

    @cached_property
    def store(self) -> Any:
        """The store, as fsspec's implementation sees it.

        Raises:
            SourceError: the implementation cannot be imported.
        """
        import fsspec

        try:
            return fsspec.filesystem(self.location.kind, **_OPTIONS.get(self.location.kind, {}))
        except ImportError as error:
            reason = why_not_imported(STORES[self.location.kind], error)
            raise SourceError(f"{self.location}: {reason}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Give what another process reads the folder by: a listing of its own tells it of all files at once.

        It finds credentials by itself, as this one did: fsspec's pickles hold those of `FSSPEC_S3_SECRET` and the like.
        """
        return {**{name: value for name, value in self.__dict__.items() if name != "store"}, "_listed": False}

    def __repr__(self) -> str:
        return str(self.location)

    def path_of(self, name: str) -> str:
        """The path of a file, as fsspec writes it."""
        return f"{self.location.path}/{name}"

    def list_again(self) -> Mapping[str, Stored]:
        """What the folder holds now, by name.

        Raises:
            SourceError: the store cannot be reached, or refuses.
        """
        with explained(self.location):
            return self._list()

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; it is the one that was listed.

        Where the store can compare it, as S3 does, reading fails once the file has changed.

        Raises:
            SourceError: the file has changed.
        """
        if not self._listed:
            self.list_again()
            self._listed = True
        path = self.path_of(name)
        if _stored(self.store.info(path)) != self.files[name]:
            raise self.changed(name)
        opened: IO[bytes] = self.store.open(path, "rb", cache_type="none")
        return opened

    def changed(self, name: str) -> SourceError:
        """The error for a file that was changed while it was read."""
        return SourceError(
            f"{self.location}/{name}: was changed while it was read. Run it again, which starts from what is there now."
        )

    def first_changed(self, names: Iterable[str]) -> str | None:
        """The first of some files that is no longer as it was listed; None where all are.

        Raises:
            SourceError: the store cannot be reached, or refuses.
        """
        now = self.list_again()
        return next((name for name in names if now.get(name) != self.files[name]), None)

    def _list(self) -> dict[str, Stored]:
        found = self._entries(self.location.path)
        inner = self._entries(self.path_of(TEMPLATES)) if (TEMPLATES, "directory") in found else {}
        listed = {name: info for (name, kind), info in found.items() if kind == "file"}
        listed |= {f"{TEMPLATES}/{name}": info for (name, kind), info in inner.items() if kind == "file"}
        return {name: _stored(info) for name, info in sorted(listed.items())}

    def _entries(self, path: str) -> dict[tuple[str, str], Mapping[str, Any]]:
        """List a folder: the name and kind of each entry, and all that is said of it; nothing where there is none."""
        self.store.invalidate_cache(path)
        try:
            found = self.store.ls(path, detail=True)
        except FileNotFoundError as error:
            if any("NoSuchBucket" in str(one) for one in chain(error)):
                raise
            return {}
        # A folder's own object has its name, and an object where a folder is expected.
        names = ((info["name"].rstrip("/").removeprefix(f"{path}/"), info) for info in found)
        return {(name, info["type"]): info for name, info in names if "/" not in name and name not in {"", ".", ".."}}


def _stored(info: Mapping[str, Any]) -> Stored:
    return Stored(int(info["size"]), " ".join(str(info[key]) for key in _STATE if info.get(key) is not None))


@contextmanager
def explained(location: Location, kind: type[MoemergeError] = SourceError) -> Iterator[None]:
    """Turn whatever a store's libraries raise into a message for the user.

    Args:
        location: what was read or written.
        kind: the kind of error to raise; a bucket that there is not is a NoSuchModelError where it is a SourceError.
    """
    try:
        yield
    except MoemergeError:
        raise
    except Exception as error:
        absent = kind is SourceError and isinstance(error, FileNotFoundError)
        raise (NoSuchModelError if absent else kind)(f"{location}: {_explain(error, location)}") from error


def _explain(error: Exception, location: Location) -> str:
    said = " ".join(printable(str(error)).split()).rstrip(".")
    if _kinds(error) & _NO_CREDENTIALS:
        return f"there are no credentials for it ({said}). Set {_CREDENTIALS[location.kind]}."
    if isinstance(error, PermissionError):
        return f"access is denied ({said}). Check the credentials, and what they allow: {_CREDENTIALS[location.kind]}."
    if location.kind == "file" and isinstance(error, OSError) and error.errno in _NO_FOLDER:
        return f"{_NO_FOLDER[error.errno]} ({said}). Choose another folder."
    if isinstance(error, FileNotFoundError):
        bucket = location.path.partition("/")[0]
        return f"there is no bucket {bucket!r}, or it was removed. Check the name, and the address of the store."
    if may_pass(error):
        return f"the store cannot be reached ({said:.200}). Check the network, and the address of the store."
    return f"the store answers: {said or type(error).__name__:.300}."


def may_pass(error: Exception) -> bool:
    """Whether an error of a store's libraries may not occur the next time."""
    names = _kinds(error)
    is_busy = any(isinstance(one, OSError) and one.errno in _BUSY for one in chain(error))
    return "FileExpired" not in names and (is_busy or is_of_network(error) or bool(names & _ON_THE_WAY))


def _kinds(error: Exception) -> set[str]:
    """Names of the classes of an error, and of those that it was raised from."""
    return {kind.__name__ for one in chain(error) for kind in type(one).__mro__}
