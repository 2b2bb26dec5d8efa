"""A real headless Chromium, driven over its DevTools pipe with the standard library."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


def why_not() -> str:
    """Empty where a browser can be started."""
    return "" if program() else "no Chromium here: sudo apt-get install -y --no-install-recommends chromium"


def program() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


class Browser:
    """One tab. `requests` and `complaints` collect what the pages asked the network for, and what went wrong."""

    def __init__(self, to_chromium: int, from_chromium: int) -> None:
        self.to, self.back = to_chromium, from_chromium
        self.count, self.rest, self.session = 0, b"", None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False

    def call(self, method: str, **params: object) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.count:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.rest:
            assert select.select([self.back], [], [], 60)[0], "Chromium says nothing for a minute"
            more = os.read(self.back, 1 << 20)
            assert more, "Chromium went away"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        params = event.get("params", {})
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"console: {params['args']}")
            case "Page.loadEventFired":
                self.loaded = True

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1280, scheme: str = "light", media: str = "screen") -> None:
        self.requests.clear(), self.complaints.clear()
        self.loaded = False
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self._note(self._read())
        self.evaluate("document.fonts.ready.then(() => 1)")

    def evaluate(self, script: str) -> object:
        """The value of an expression, evaluated beside the page's own policy."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")


# Chromium reads its commands from descriptor 3 and answers on 4.
PIPES = """
import fcntl, os, sys
there, here = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(there, 3), os.dup2(here, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def start(folder: Path):
    """A Browser whose names all resolve to nothing; `folder` is its profile."""
    there, to = os.pipe()
    back, here = os.pipe()
    command = [
        program(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder}",
        "--remote-debugging-pipe",
    ]
    wrapped = [sys.executable, "-c", PIPES, str(there), str(here), *command]
    child = subprocess.Popen(wrapped, pass_fds=(there, here), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(there), os.close(here)
    browser = Browser(to, back)
    try:
        browser.attach()
        yield browser
    finally:
        os.close(to), os.close(back)
        child.terminate()
        child.wait(timeout=20)
