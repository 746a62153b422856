"""The two other hosts: where large files come from, and where they are uploaded to."""

from __future__ import annotations

import hashlib
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote

from tests.support.hub_server.answer import AnswerError
from tests.support.hub_server.serving import Handler
from tests.support.hub_server.state import Blob

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class Incoming:
    """An upload of one object, in one or several parts."""

    name: str
    repo: str
    sha256: str
    size: int
    """As it was announced."""
    part_size: int | None
    file: Path | None
    """Where it is kept; None is in memory."""
    memory: dict[int, bytes] = field(default_factory=dict)
    """Its parts by their numbers, where there is no file."""
    tags: dict[int, str] = field(default_factory=dict)
    """The ETag of each part that arrived."""
    is_complete: bool = False

    @property
    def blob(self) -> Blob:
        return Blob(self.file or b"".join(part for _, part in sorted(self.memory.items())), in_lfs=True)

    @property
    def parts(self) -> int:
        return -(-self.size // self.part_size) if self.part_size else 1

    def clear(self) -> None:
        """Have a file to write to."""
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(b"")

    @contextmanager
    def open_part(self, number: int) -> Iterator[BinaryIO]:
        """Where to write a part, which may come anew and beside others."""
        if self.file:
            with self.file.open("r+b") as file:
                file.seek((number - 1) * (self.part_size or 0))
                yield file
        else:
            yield (memory := BytesIO())
            self.memory[number] = memory.getvalue()


class SignedHandler(Handler):
    """A host that knows nobody, and goes by the signatures in its addresses."""

    signature = ""

    def answer(self) -> None:
        if "Authorization" in self.headers:
            raise AnswerError(400, message="A token was sent to another host")
        if self.query.get(self.signature) != [self.hub.sign(self.route)]:
            raise AnswerError(403, message="Request has expired")
        self.serve(*map(unquote, self.route[1:].split("/", 2)))

    def serve(self, repo: str, sha256: str, rest: str) -> None:
        raise NotImplementedError


class CdnHandler(SignedHandler):
    """Sends what is in LFS."""

    host = "cdn"
    signature = "Signature"

    def serve(self, repo: str, sha256: str, path: str) -> None:
        repository = self.hub.repositories.get(repo)
        blob = repository.objects.get(sha256) if repository else None
        if blob is None:
            raise AnswerError(404, message="The specified key does not exist.")
        tag = hashlib.md5(sha256.encode(), usedforsecurity=False).hexdigest()
        self.send_file(repo, path, blob, {"ETag": f'"{tag}"'})


class UploadsHandler(SignedHandler):
    """Takes what is going into LFS."""

    host = "uploads"
    signature = "X-Amz-Signature"

    def serve(self, repo: str, sha256: str, rest: str) -> None:
        name, _, part = rest.partition("/")
        incoming = self.hub.incoming.get(name)
        if self.command != "PUT" or incoming is None or (incoming.repo, incoming.sha256) != (repo, sha256):
            raise AnswerError(404, message="The specified upload does not exist.")
        number = int(part) if re.fullmatch(r"\d+", part) else 1
        with self.hub.lock:
            corrupt = self.hub.corrupts_uploads > 0
            self.hub.corrupts_uploads -= corrupt
        if incoming.part_size is None:
            incoming.clear()
        check = 0
        with incoming.open_part(number) as file:
            for piece in self.body:
                # Connections that were open before the host refused new ones end here.
                if not self.hub.takes_uploads:
                    raise ConnectionAbortedError
                arrived = self.hub.count_received(sha256, len(piece))
                if corrupt:
                    piece[0] ^= 1
                    corrupt = False
                file.write(piece)
                check = zlib.crc32(piece, check)
                if self.hub.uploads_end_after is not None and arrived >= self.hub.uploads_end_after:
                    self.hub.refuse_uploads()
                    raise ConnectionAbortedError
        incoming.is_complete = incoming.part_size is None
        incoming.tags[number] = f'"{check:08x}{number:024x}"'
        self.send(200, b"", {"ETag": incoming.tags[number]})
