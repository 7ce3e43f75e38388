"""Chromium as it is, spoken to over a pipe in the protocol of its own developer tools."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
PATIENCE = 300.0  # seconds for one reply
AXE = "TAID_VLM_AXE"  # path of another axe.min.js, such as a newer one
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")


def axe_source() -> str:
    """Of the package axe-core-python (or where the environment says); skips without."""
    spec = find_spec("axe_core_python")
    places = [os.environ.get(AXE), spec and spec.origin and Path(spec.origin).with_name(
        "axe.min.js")]
    path = next((Path(place) for place in places if place), None)
    if path is None:
        pytest.skip(f"axe-core-python is not installed, and {AXE} names no axe.min.js")
    return path.read_text(encoding="utf-8")


class Browser:
    """One tab. `problems` is what the console has said since `open`."""

    def __init__(self, folder: Path) -> None:
        if CHROMIUM is None:
            pytest.skip("no Chromium is installed")
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions",
                   "--hide-scrollbars", "--force-device-scale-factor=1",
                   "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        pipes = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, CHROMIUM, *options], pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self._read, self._last, self._session, self.events = b"", 0, "", list[dict[str, Any]]()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target,
                                  flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        self.send("Browser.close")
        os.close(self._out), os.close(self._in)
        self._process.wait(PATIENCE)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The reply to one command; what happens meanwhile is kept in `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        os.write(self._out, json.dumps(
            message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while (reply := self._next()).get("id") != self._last:
            self.events.append(reply)
        assert "error" not in reply, reply
        return dict(reply["result"])

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._read:
            assert select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0], \
                "Chromium does not answer"
            self._read += os.read(self._in, 1 << 20)
        line, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path, width: int = 1280, scheme: str = "light", script: bool = True,
             scale: float = 1.0) -> None:
        """A file in a window of so many CSS pixels; without its script, if that is wanted."""
        self.events.clear()
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.show(scheme)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=scale, mobile=width < 600)
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def show(self, scheme: str, media: str = "") -> None:
        """Light or dark; on a screen or in "print"."""
        self.send("Emulation.setEmulatedMedia", media=media, features=[
            {"name": "prefers-color-scheme", "value": scheme}])

    def ask(self, script: str) -> Any:
        """What an expression comes to, awaited, as plain values."""
        reply = self.send("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36,
                    "End": 35}.get(key, 0)
            for kind in ("keyDown", "keyUp"):
                self.send("Input.dispatchKeyEvent", type=kind, key=key,
                          windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}))

    def point(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    @property
    def problems(self) -> list[str]:
        """Errors and warnings of the console, what was thrown, what was not loaded."""
        seen = [e for e in self.events if e["method"] in (
            "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]
        return [json.dumps(event["params"])[:400] for event in seen]

    def violations(self, axe: str, *rules: str) -> list[str]:
        """What axe-core finds, with where; by some of its rules or all."""
        self.send("Runtime.evaluate", expression=axe)
        only = {"type": "rule", "values": rules} if rules else {"type": "tag", "values": RULES}
        options = json.dumps({"resultTypes": ["violations"], "runOnly": only})
        found = self.ask(f"axe.run(document, {options}).then(result => result.violations)")
        return [f"{v['id']}: {node['html'][:200]} ({node['failureSummary']})"
                for v in found for node in v["nodes"]]

    def picture(self, height: int | None = None) -> bytes:
        """A PNG of the page from its top, as high as it is or `height` CSS pixels."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        reply = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip={
            "x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1})
        return base64.b64decode(reply["data"])
