"""Requests and answers, as all hosts handle them."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_server.answer import AnswerError
from tests.support.hub_server.counting import Call, Request
from tests.support.hub_server.faults import Fault
from tests.support.hub_server.state import CHUNK, Blob

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.hub_server.hub import Hub

FILLER = bytes(16)
"""What comes too much where a body is longer than asked."""


def _as_model(match: re.Match[str]) -> str:
    """The beginning of a model's route in place of a data set's."""
    return f"/api/models{match[2]}" if match[1] else match[2]


class Handler(BaseHTTPRequestHandler):
    """A connection to one of the hosts."""

    protocol_version = "HTTP/1.1"
    server_version = "Hub"
    # Else a small body waits for the receipt of its headers.
    disable_nagle_algorithm = True
    host = ""

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def setup(self) -> None:
        super().setup()
        self.hub.count_connection(self.host)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        # Every repository is a data set, too.
        self.route, self.query = re.sub(r"^(/api)?/datasets(/[^/]+/)", _as_model, url.path), parse_qs(url.query)
        self.body = self._receive()
        self.call = Call(self.command, self.host, unquote(url.path), "Authorization" in self.headers)
        self.hub.calls.append(self.call)
        try:
            try:
                self.hub.faults.meet(self.call)
                self.answer()
            except AnswerError as error:
                self.send_json(error.body, error.status, error.headers)
            if not self.close_connection:
                # What is left of the body would be taken for the next request.
                for _ in self.body:
                    pass
        except ConnectionError:  # the caller has gone
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def answer(self) -> None:
        raise NotImplementedError

    def _receive(self) -> Iterator[memoryview]:
        """The request's body as it arrives; every piece is overwritten by the next."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield from self._receive_bytes(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._receive_bytes(int(self.headers.get("Content-Length", 0)))

    def _receive_bytes(self, size: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(size, CHUNK)))
        while size:
            count = self.rfile.readinto1(buffer[:size])
            if not count:
                raise ConnectionAbortedError
            size -= count
            yield buffer[:count]

    def read_body(self) -> bytes:
        return b"".join(map(bytes, self.body))

    def asks(self, name: str) -> bool:
        """Whether a switch in the query is on."""
        return self.query.get(name, ["0"])[0].lower() in {"1", "true"}

    def send_response(self, code: int, message: str | None = None) -> None:
        self.call.status = code
        super().send_response(code, message)

    def send_start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_start(status, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send_file(self, repo: str, path: str, blob: Blob, headers: dict[str, str]) -> None:
        """Answer with the part of a file that was asked for, or with what a fault makes of it."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").replace(" ", ""))
        start, end = self._find_range(blob.size, *match.groups()) if match else (0, blob.size)
        fault = self._take_fault(path) if self.command == "GET" else None
        self.hub.requests.append(Request(self.command, repo, path, start, end))
        headers = headers | {"Accept-Ranges": "bytes"}
        if match and start >= end:
            raise AnswerError(416, **{"Content-Range": f"bytes */{blob.size}"})
        filler = b""
        if fault and fault.wrong == "short":
            end -= (end - start + 1) // 2
        elif fault and fault.wrong == "shifted" and match:
            start, end = (start - 1, end - 1) if start else (1, min(end + 1, blob.size))
        elif fault and fault.wrong == "whole":
            match, start, end = None, 0, blob.size
        elif fault and fault.wrong == "long":
            filler = FILLER
        if match:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        self.send_start(206 if match else 200, end - start + len(filler), headers)
        if self.command == "HEAD":
            return
        if fault and fault.cut:
            self.close_connection = True
            end = start + ((end - start) // 2 if fault.cut_after is None else min(fault.cut_after, end - start))
        self._send_content(repo, path, blob, start, end)
        self.wfile.write(filler)

    def _find_range(self, size: int, first: str, last: str) -> tuple[int, int]:
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(int(last) + 1, size) if last else size

    def _take_fault(self, path: str) -> Fault | None:
        first = not any(r.method == "GET" and r.path == path for r in self.hub.requests)
        if first and path in self.hub.breaks_off:
            return Fault(self.call.path, 1, cut=True)
        return self.hub.faults.take_in_body(self.call)

    def _send_content(self, repo: str, path: str, blob: Blob, start: int, end: int) -> None:
        # Counted before, since the caller may look as soon as it has the last byte.
        self.hub.count_sent(repo, path, end - start)
        done = start
        try:
            if isinstance(blob.content, Path):
                with blob.content.open("rb") as file:
                    try:
                        if end > start:
                            self.connection.sendfile(file, start, end - start)
                    finally:
                        done = max(start, file.tell())
            else:
                view = memoryview(blob.content)
                for done in range(start, end, CHUNK):
                    self.wfile.write(view[done : min(done + CHUNK, end)])
                done = end
        finally:
            self.hub.count_sent(repo, path, done - end)

    def finish(self) -> None:
        with suppress(ConnectionError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Tests read what was requested from the counters."""
