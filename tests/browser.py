"""A headless Chromium driven over its debugging pipe: no driver, no package, no port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str:
    """Return the browser's path; without one the test is skipped, in CI it fails."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if "CI" in os.environ:
            pytest.fail("no Chromium: the page must be opened in a real browser in CI")
        pytest.skip("no Chromium")
    return found


class Tab:
    """One page: runs scripts in it, and keeps what it said and asked for."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._count, self._rest, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []

    def open(self, address: str, width: int = 1400, height: int = 900) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)
        self.send("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def evaluate(self, script: str) -> Any:
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name: str, text: str = "") -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27}
        facts = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name], **({"text": text} if text else {})}
        self.send("Input.dispatchKeyEvent", type="keyDown", **facts)
        self.send("Input.dispatchKeyEvent", type="keyUp", **facts)

    def click(self, selector: str) -> None:
        """Click in the middle of the first element that the selector finds, as a mouse does."""
        place = self.evaluate(
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})()"
        )
        shared = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **shared)

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What went wrong: exceptions, console errors, blocked loads."""
        bad = ("Runtime.exceptionThrown", "Network.loadingFailed")
        logged = ("Log.entryAdded", "Runtime.consoleAPICalled")
        return [event for event in self.events if event["method"] in bad or event["method"] in logged]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            found = self._receive()
            if found.get("id") == self._count:
                assert "error" not in found, found
                return found["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._read.read1(65536)
            assert part, "the browser has gone"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(line)
        if "method" in found:
            self.events.append(found)
        return found


@contextmanager
def browsing(profile: Path) -> Iterator[Tab]:
    """Start a browser with an empty profile, end it afterwards."""
    into, mine = os.pipe()
    theirs, out = os.pipe()[::-1]
    command = [chromium(), *QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # The pipe has fixed numbers; a shell moves ours there.
    shell = ["sh", "-c", f'exec "$@" 3</dev/fd/{into} 4>/dev/fd/{theirs}', "sh", *command]
    process = subprocess.Popen(shell, pass_fds=(into, theirs), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(into)
    os.close(theirs)
    tab = Tab(out, mine)
    try:
        yield tab
    finally:
        tab._session = None
        tab.send("Browser.close")
        process.wait(timeout=30)
        tab._read.close()
        tab._write.close()
