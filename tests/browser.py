"""A headless Chromium, driven over its DevTools pipe: JSON messages that end in a zero byte."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

BROWSER = Path(__file__).parent.parent / "scripts/browser"
UNAVAILABLE = 77
"""scripts/browser's exit code where no browser can be had."""
FLAGS = (
    "--headless=shell",
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
Scheme = Literal["light", "dark"]


CONTRAST = """(() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
  const background = (element) => {
    if (!element) return parse(getComputedStyle(document.documentElement).colorScheme && matchMedia(
      "(prefers-color-scheme: dark)").matches ? "rgb(18,18,18)" : "rgb(255,255,255)");
    return over(parse(getComputedStyle(element).backgroundColor), background(element.parentElement));
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map(
      (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const poor = [];
  let seen = 0;
  for (const details of document.querySelectorAll("details")) details.open = true;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || !element.getClientRects().length) continue;
    if (element.closest("script, title, desc, .unseen")) continue;
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const below = background(element);
    const [high, low] = [over(parse(colour), below), below].map(luminance).sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    seen += 1;
    if (ratio < 4.5) poor.push([node.data.trim().slice(0, 40), ratio]);
  }
  return {poor, seen};
})()"""
"""How many texts are on the page, and which have too little contrast (WCAG 2: 4.5)."""


def find() -> tuple[str | None, str]:
    """The browser's path, or None and why there is none."""
    ran = subprocess.run([BROWSER], capture_output=True, text=True)
    if ran.returncode == UNAVAILABLE:
        return None, ran.stderr.strip()
    ran.check_returncode()
    return ran.stdout.strip(), ""


class Page:
    """One tab. What it complains about or asks the network for is kept."""

    def __init__(self, process: subprocess.Popen[bytes], read: int, write: int) -> None:
        self._process, self._read, self._write = process, read, write
        self._buffer, self._last, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not (read := os.read(self._read, 1 << 20)):
                raise RuntimeError(f"the browser ended with {self._process.wait()}")
            self._buffer += read
        text, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, path: Path, *, width: int = 1200, scheme: Scheme = "light") -> None:
        """Load a file and wait until it has loaded; forget earlier events."""
        self.look(width=width, scheme=scheme)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive())
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def look(self, *, width: int, scheme: Scheme, media: str = "screen") -> None:
        metrics = {"height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", width=width, **metrics)
        colours = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=colours)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is kept."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"], indent=1))
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, beyond the window too."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    @property
    def complaints(self) -> list[str]:
        """Console messages, uncaught exceptions, violations of the page's own policy."""
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [json.dumps(e["params"]) for e in self.events if e["method"] in kinds]

    @property
    def requested(self) -> list[str]:
        """Every address that was asked for, the page's own included."""
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]


@contextmanager
def page(browser: str, profile: Path) -> Iterator[Page]:
    """A fresh browser with one tab; `profile`: an empty directory of its own."""
    theirs_read, write = os.pipe()
    read, theirs_write = os.pipe()
    # Chromium reads from descriptor 3 and writes to 4.
    redirect = f'exec "$0" "$@" 3<&{theirs_read} 4>&{theirs_write}'
    process = subprocess.Popen(
        ["bash", "-c", redirect, browser, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(theirs_read, theirs_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_read)
    os.close(theirs_write)
    try:
        tab = Page(process, read, write)
        yield tab
        with suppress(RuntimeError, BrokenPipeError):  # it hangs up before it answers
            tab.call("Browser.close")
    finally:
        process.kill()
        process.wait()
        os.close(write)
        os.close(read)
