"""A headless Chromium, driven over a pair of pipes by the DevTools protocol; no sockets and no packages."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium reads commands from descriptor 3 and writes answers to 4; both may be taken by the other's pipe at first.
LAUNCH = """
import fcntl, os, sys
pair = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(pair, (3, 4)):
    os.dup2(end, wanted)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-breakpad", "--mute-audio",
)  # fmt: skip
TIMEOUT = 60  # seconds: a busy machine starts it slowly
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, "Escape": 27, "Enter": 13}


class Browser:
    """One tab."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._received, self._last, self._session = b"", 0, {}
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda found: found.get("id") == self._last)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next message that is wanted; events before it are kept."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            while b"\0" not in self._received:
                ready, _, _ = select.select([self._answers], [], [], max(0, deadline - time.monotonic()))
                chunk = os.read(self._answers, 1 << 20) if ready else b""
                if not chunk:
                    raise TimeoutError("Chromium does not answer" if not ready else "Chromium has ended")
                self._received += chunk
            raw, _, self._received = self._received.partition(b"\0")
            message: dict[str, Any] = json.loads(raw)
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message

    def open(self, page: Path) -> None:
        self.send("Page.navigate", url=page.as_uri())
        self._wait(lambda found: found.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def _middle(self, selector: str) -> dict[str, float]:
        element = f"document.querySelector({json.dumps(selector)})"
        middle: dict[str, float] = self.evaluate(
            f"(() => {{ {element}.scrollIntoView(); const box = {element}.getClientRects()[0];"
            "return { x: box.x + box.width / 2, y: box.y + box.height / 2 }; })()"
        )
        return middle

    def hover(self, selector: str) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self._middle(selector))

    def click(self, selector: str) -> None:
        middle = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **middle)

    def tap(self, selector: str) -> None:
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self._middle(selector)])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def scheme(self, name: str) -> None:
        self.send(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": name},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def complaints(self) -> list[dict[str, Any]]:
        """What a developer would see in the console."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        return [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block, whatever happens in it."""
    reading, commands = os.pipe()
    answers, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-IS", "-c", LAUNCH, str(reading), str(writing), CHROMIUM or "", *OPTIONS, f"--user-data-dir={profile}"],
        pass_fds=(reading, writing), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.close(reading)
    os.close(writing)
    try:
        yield Browser(commands, answers)
    finally:
        # It quits by itself when its pipe is closed, which also holds where this process is killed.
        os.close(commands)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(answers)
