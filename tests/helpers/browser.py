"""A headless Chromium, controlled through chromedriver (W3C WebDriver). Both are packages of Debian.

Asserted by the tests that use it, such as tests/e2e/test_tensorboard_long.py.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from grpo_mega.parallel.ports import free_port
from tests.helpers.jobs import REPOSITORY

ARTIFACTS = REPOSITORY / "runs" / "test-artifacts"
"""Folder of the screenshots of tests, for a person to look at."""

needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs Chromium: apt-get install -y chromium chromium-driver",
)

# Elements of a page and of all its shadow trees, in which TensorBoard keeps its charts.
_ALL_ELEMENTS = """
function* elements(root) {
  for (const element of root.querySelectorAll('*')) {
    yield element;
    if (element.shadowRoot) yield* elements(element.shadowRoot);
  }
}
const found = [...elements(document)];
"""


class Browser:
    """One browser window.

    Args:
        width: of the window, in pixels.
        height: of the window, in pixels.
    """

    def __init__(self, width: int = 1500, height: int = 1100) -> None:
        port = free_port()
        self._address = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--window-size={width},{height}",
            ]
        }
        timeouts = {"script": 100_000}  # milliseconds
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}, "timeouts": timeouts}
        self._wait_until_ready()
        started = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})
        self._session = f"/session/{started['sessionId']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call("DELETE", self._session, None)
        finally:
            self._driver.terminate()
            self._driver.wait(20)

    def open(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """Return the value that the body of a JavaScript function returns. `found` are all elements of the page, and
        `elements(root)` yields those below one of them."""
        body = {"script": f"{_ALL_ELEMENTS}\n{script}", "args": []}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def wait_for(self, script: str, seconds: float = 60.0) -> Any:
        """Return the first value of the script that is not falsy.

        Raises:
            TimeoutError: there was none within `seconds`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.5)
        raise TimeoutError(f"the page did not reach the state in {seconds:g} s: {script}")

    def errors(self) -> list[str]:
        """Return the errors in the console since the last call."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, name: str) -> Path:
        """Write a PNG of the window to the folder of the artifacts."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        (ARTIFACTS / name).write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot", None)))
        return ARTIFACTS / name

    def _wait_until_ready(self) -> None:
        for _ in range(100):
            try:
                if self._call("GET", "/status", None)["ready"]:
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("chromedriver did not answer within 10 s")

    def _call(self, method: str, path: str, body: object) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {json.load(error)['value']['message']}") from error
