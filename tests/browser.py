"""A real browser for tests of pages."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")

# What the WebDriver standard calls these keys.
ENTER, ESCAPE, LEFT, UP, RIGHT, DOWN, TAB = "\ue007", "\ue00c", "\ue012", "\ue013", "\ue014", "\ue015", "\ue004"
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


class Browser:
    """As much of the WebDriver protocol as these tests need."""

    def __init__(self, server: str, profile: Path) -> None:
        self._server, self._session = server, ""
        options = {"binary": BROWSER, "args": [*ARGUMENTS.split(), f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        self._session = "/session/" + self._call("/session", {"capabilities": wanted})["sessionId"]

    def open(
        self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False, script: bool = True
    ) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.devtools("Emulation.setScriptExecutionDisabled", value=not script)
        self._call(self._session + "/url", {"url": address})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call(self._session + "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str) -> Any:
        return self._call(self._session + "/execute/sync", {"script": script, "args": []})

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 10
        while not self.run(f"return {condition}"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call(self._session + "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def point(self, x: int, y: int) -> None:
        move = {"type": "pointerMove", "x": x, "y": y}
        self._call(self._session + "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._call(self._session + "/se/log", {"type": kind})
        return entries

    def quit(self) -> None:
        self._call(self._session, None, "DELETE")

    def _call(self, path: str, body: object, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server + path, data, headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 — our own server
                return json.load(answer)["value"]
        except urllib.error.HTTPError as exc:
            with exc:
                raise AssertionError(exc.read().decode()[:500]) from None


@contextlib.contextmanager
def started(home: Path) -> Iterator[Browser]:
    """Yield a browser that keeps its things in a folder."""
    assert DRIVER
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout
            lines = iter(server.stdout.readline, "")
            port = next(found[1] for line in lines if (found := re.search(r"on port (\d+)\.", line)))
            browser = Browser(f"http://127.0.0.1:{port}", home)
            yield browser
            browser.quit()
        finally:
            server.terminate()
