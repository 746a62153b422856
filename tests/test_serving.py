"""What asks a server that is started tells its refusals at once, and leaves no process."""

import signal
import sys

import pytest

from tests.next_steps import serve


def test_a_refusal_is_told_at_once_with_the_servers_words():
    port = serve.free_port()
    words = ["python", "-m", "http.server", "--bind", serve.HOST, str(port)]  # which knows no POST
    with serve.served(sys.executable, words) as server, pytest.raises(RuntimeError) as caught:
        serve.ask(server, port, "out", "Once upon a time")
    told = str(caught.value)
    assert told.startswith("HTTP Error 501: Unsupported method ('POST'): <!DOCTYPE HTML>")
    assert "Server does not support this operation." in told
    assert server.returncode is not None


def test_a_server_that_does_not_end_when_it_is_asked_to_is_gone_too(monkeypatch):
    monkeypatch.setattr(serve, "STOP_SECONDS", 0.1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # so does what is started now
    try:
        with serve.served(sys.executable, ["python", "-c", "import time; time.sleep(60)"]) as server:
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert server.returncode == -signal.SIGKILL
