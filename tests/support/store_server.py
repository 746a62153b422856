"""An S3 server on this machine: moto's, with a record of its requests, and faults that a test asks for."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Call:
    """A request that the server has answered."""

    method: str
    key: str
    """The object's key after the bucket, or the prefix that is listed."""
    first: int | None
    """The first byte that was asked for."""
    last: int | None


@dataclass
class StoreServer:
    """What an S3 server was asked, and what goes wrong there next."""

    calls: list[Call] = field(default_factory=list)
    faults: list[tuple[str, str, Callable[[], int | None]]] = field(default_factory=list)

    def before(self, method: str, pattern: str, action: Callable[[], int | None]) -> None:
        """Call `action` before the next request of a method to such a key; a status that it gives is the answer."""
        self.faults.append((method, pattern, action))

    def ranges(self, pattern: str) -> list[tuple[int | None, int | None]]:
        return [(c.first, c.last) for c in self.calls if c.method == "GET" and fnmatch(c.key, pattern)]

    def sent(self, pattern: str) -> list[str]:
        """Keys that were written, in this order; parts of an object count once."""
        keys = [c.key for c in self.calls if c.method == "PUT" and fnmatch(c.key, pattern)]
        return list(dict.fromkeys(keys))

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve; gives the address."""
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):  # type: ignore[misc]
            def log_request(self, *_: Any) -> None:
                pass

        application = DomainDispatcherApplication(create_backend_app)
        server = make_server("127.0.0.1", 0, self._recording(application), threaded=True, request_handler=Quiet)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _recording(self, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            key = environ["PATH_INFO"].strip("/").partition("/")[2]
            asked = environ.get("HTTP_RANGE", "").removeprefix("bytes=").partition("-")
            first, last = (int(asked[0]), int(asked[2])) if asked[1] else (None, None)
            method = environ["REQUEST_METHOD"]
            for fault in [f for f in self.faults if f[0] == method and fnmatch(key, f[1])][:1]:
                self.faults.remove(fault)
                if status := fault[2]():
                    start(f"{status} Fault", [("Content-Length", "0")])
                    return []
            self.calls.append(Call(method, key, first, last))
            return application(environ, start)

        return answer


@pytest.fixture(scope="session")
def store_server() -> Iterator[tuple[StoreServer, str]]:
    """One server for all tests; each test uses a bucket of its own."""
    pytest.importorskip("moto")
    server = StoreServer()
    with server.running() as url:
        yield server, url


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server."""

    server: StoreServer
    name: str
    fs: Any

    def url(self, path: str) -> str:
        return f"s3://{self.name}/{path}"

    def put(self, folder: Path, path: str) -> str:
        """Send a folder's files; returns the address."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.fs.pipe(f"{self.name}/{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return self.url(path)

    def files(self, path: str) -> dict[str, bytes]:
        """What is there now, by name."""
        self.fs.invalidate_cache()
        found = self.fs.find(f"{self.name}/{path}")
        return {name.removeprefix(f"{self.name}/{path}/"): self.fs.cat_file(name) for name in found}


@pytest.fixture
def bucket(
    store_server: tuple[StoreServer, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Bucket]:
    """An empty bucket, with the environment that finds it."""
    s3fs = pytest.importorskip("s3fs")
    server, url = store_server
    environment = {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "ours", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    fs = s3fs.S3FileSystem()
    fs.mkdir(name)
    server.calls.clear()
    yield Bucket(server, name, fs)
    server.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()
