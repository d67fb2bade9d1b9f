"""A headless Chromium driven through its own debugging pipe: no driver, no package.

Protocol: https://chromedevtools.github.io/devtools-protocol/ ; messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Path of a Chromium, from ``CHROMIUM`` or the usual names."""
    given = os.environ.get("CHROMIUM")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in one headless browser; a context manager."""

    def __init__(self, program: str, downloads: Path, timeout: float = 200.0) -> None:
        self.timeout, self.problems, self._last, self._rest = timeout, [], 0, b""
        self.profile = tempfile.mkdtemp(prefix="audit-browser-")
        near_in, self._out = os.pipe()
        self._in, near_out = os.pipe()
        # the browser wants its ends as 3 and 4: out of the way first
        theirs_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (near_in, near_out))
        os.close(near_in)
        os.close(near_out)
        options = (
            "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-extensions --hide-scrollbars"
        )
        options += " --disable-background-networking --disable-component-update --disable-dev-shm-usage"
        line = f'exec "$0" {options} --user-data-dir="$1" --remote-debugging-pipe about:blank '
        line += f"3<&{theirs_in} 4>&{theirs_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, self.profile],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    _session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; page errors that pass by are kept in ``problems``."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            answer = self._read(end)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise TimeoutError(f"the browser did not answer {method} in {self.timeout:.0f} s")

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has gone")
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))
        return message

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def open(self, page: Path) -> None:
        """Load a local file."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + self.timeout
        while self.run("document.readyState") != "complete" or self.run("location.protocol") != "file:":
            if time.monotonic() > end:
                raise TimeoutError(f"{page} does not load")
            time.sleep(0.1)

    def size(self, width: int, height: int, phone: bool = False, dark: bool = False) -> None:
        """Set the window."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        """One key on the keyboard."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def cards(self) -> list[int]:
        """Indices of the samples that a report shows, in their order."""
        return self.run("[...document.querySelectorAll('.card')].map(c => +c.dataset.index)")

    def choose(self, field: str, value: str) -> list[int]:
        """Set a field of a report and leave it; the samples shown then."""
        self.run(
            f"(() => {{ const s = document.getElementById('{field}'); s.value = '{value}'; "
            "s.dispatchEvent(new Event('input')); document.activeElement.blur(); })()"
        )
        return self.cards()

    def save(self, path: Path) -> Path:
        """Press a report's button and wait for the file that it downloads."""
        self.run("document.getElementById('save').click()")
        for _ in range(300):
            if path.exists() and path.stat().st_size:
                break
            time.sleep(0.2)
        return path

    def screenshot(self, path: Path) -> None:
        """The visible part as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)
