"""A headless Chromium that opens pages and clicks through them, by the DevTools protocol over two pipes.

The browser opens no port and needs no driver. Its protocol: https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
REASON = "no Chromium (chromium, chromium-browser, google-chrome) is installed: sudo make chromium"
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-features=IsolateSandboxedIframes",  # errors in a frame are told as those of its page
    "--remote-debugging-pipe",
)
_NO_GPU = ("--disable-gpu",)
_WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # drawn by the processor
_WAIT = 120.0  # s; nothing is measured by it

# Elements with more content than their box has room for. `scroll` containers are allowed where the window is wide.
_OUTSIDE = """
(() => {
  const wide = document.documentElement;
  const found = [];
  if (wide.scrollWidth > wide.clientWidth) found.push(`the page: ${wide.scrollWidth} > ${wide.clientWidth}`);
  for (const one of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(one);
    if (one.clientWidth === 0 || style.display === "inline" || style.visibility === "hidden") continue;
    if (one.matches("select, input, img")) continue;
    if (SCROLLS && ["auto", "scroll"].includes(style.overflowX)) continue;
    if (one.scrollWidth > one.clientWidth + 1) {
      const words = one.textContent.slice(0, 60);
      found.push(`${one.tagName}#${one.id}.${one.className}: ${one.scrollWidth} > ${one.clientWidth}: ${words}`);
    }
  }
  return found;
})()
"""
# Texts with a contrast below 4.5 to 1, the least that WCAG 2.1 (AA) asks for. Whatever is switched off may be fainter.
_FAINT = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, at) => {
    const part = colour[at] / 255;
    return sum + weight * (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (one) => {
    const colour = numbers(getComputedStyle(one).backgroundColor);
    if (colour[3] !== 0) return colour;
    return one.parentElement ? behind(one.parentElement) : [255, 255, 255];
  };
  const found = [];
  for (const one of document.body.querySelectorAll("*")) {
    const text = [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!text || one.closest("script, style, noscript, option, :disabled") || !one.getClientRects().length) continue;
    const [low, high] = [luminance(numbers(getComputedStyle(one).color)), luminance(behind(one))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    const words = one.textContent.slice(0, 40);
    if (contrast < 4.5) found.push(`${one.tagName}.${one.className} ${contrast.toFixed(2)}: ${words}`);
  }
  return found;
})()
"""

_MIDDLE = """(selector) => {
  const one = document.querySelector(selector);
  one.scrollIntoView({ block: "center" });
  const box = one.getClientRects()[0];
  return [box.x + box.width / 2, box.y + box.height / 2];
}"""


def find() -> str | None:
    """The Chromium of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A page of the browser. Everything it logs as an error is collected in `errors`.

    Parameters
    ----------
    width, height : int
        Size of the window, in CSS pixels.
    dark : bool
        Whether the user prefers dark pages.
    webgl : bool
        Whether surfaces can be drawn.
    """

    def __init__(self, width: int = 1400, height: int = 900, dark: bool = False, webgl: bool = False):
        path = find()
        if path is None:
            pytest.skip(REASON)
        self.errors: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="slim-browser-")
        commands_read, self._commands = os.pipe()
        self._answers, answers_write = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to descriptor 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands_read, answers_write)]
        silence = os.open(os.devnull, os.O_RDWR)
        self._pid = os.posix_spawn(
            path,
            [path, *_FLAGS, *(_WEBGL if webgl else _NO_GPU), f"--user-data-dir={self._profile}", "about:blank"],
            os.environ,
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, silence, number) for number in (1, 2)),
                *((os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(ends, 3)),
            ],
            setpgroup=0,
        )
        for end in (commands_read, answers_write, silence, *ends):
            os.close(end)
        self._rest, self._number, self._session = b"", 0, None
        self._loaded = False
        page = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self.resize(width, height)
        self._scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.show_for("screen")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message. Events are noted."""
        while b"\0" not in self._rest:
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        found = json.loads(message)
        told = found.get("params", {})
        match found.get("method"):
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            case "Page.loadEventFired":
                self._loaded = True
        return found

    def resize(self, width: int, height: int = 900) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def show_for(self, medium: str) -> None:
        """Show pages as on a `screen`, or in `print`."""
        self("Emulation.setEmulatedMedia", media=medium, features=[self._scheme])

    def open(self, path: Path) -> None:
        """Open a page as a file, and wait until it is loaded."""
        self._loaded = False
        self("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def run(self, code: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def run_in_frame(self, name: str, code: str) -> Any:
        """The value of an expression in a frame that has loaded `name`; None before that. It sees elements alone."""
        for child in self("Page.getFrameTree")["frameTree"].get("childFrames", ()):
            if child["frame"]["url"].endswith(name):
                world = self("Page.createIsolatedWorld", frameId=child["frame"]["id"])["executionContextId"]
                found = self("Runtime.evaluate", expression=code, returnByValue=True, contextId=world)
                return found["result"].get("value")
        return None

    def wait(self, code: str, frame: str | None = None) -> None:
        """Wait until an expression is true, in the page or in a frame."""
        end = time.monotonic() + _WAIT
        while not (self.run(code) if frame is None else self.run_in_frame(frame, code)):
            assert time.monotonic() < end, f"never became true: {code}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse, as a person does: what covers it gets the click."""
        x, y = self.run(f"({_MIDDLE})({json.dumps(selector)})")
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, text: str = "") -> None:
        """Press a key, such as Tab, Enter (with the text \\r) or Escape."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        code = codes.get(key, 0)
        down = {"type": "keyDown" if text else "rawKeyDown", "key": key, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", **down, **({"text": text} if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, selector: str, text: str) -> None:
        """Type a text into an empty field."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        one = f"document.querySelector({json.dumps(selector)})"
        self.run(f"({one}.value = {json.dumps(value)}, {one}.dispatchEvent(new Event('input', {{bubbles: true}})))")

    def text(self, selector: str) -> str:
        """The visible text of an element, in one line."""
        return " ".join(self.run(f"document.querySelector({json.dumps(selector)}).innerText").split())

    def texts(self, selector: str) -> list[str]:
        """The visible text of all elements that match."""
        code = f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.innerText)"
        return [" ".join(words.split()) for words in self.run(code)]

    def outside(self, scrolls: bool = False) -> list[str]:
        """Elements whose content is wider than their box; with `scrolls`, boxes that scroll sideways are allowed."""
        return self.run(_OUTSIDE.replace("SCROLLS", json.dumps(scrolls)))

    def faint(self) -> list[str]:
        """Texts with too little contrast to what is behind them."""
        return self.run(_FAINT)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        data = self("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser and remove its profile."""
        for pipe in (self._commands, self._answers):
            os.close(pipe)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        shutil.rmtree(self._profile, ignore_errors=True)


@contextlib.contextmanager
def browser(**settings: Any) -> Iterator[Browser]:
    """A browser for a `with` statement; what it logged as an error fails the test at the end."""
    opened = Browser(**settings)
    try:
        yield opened
        opened.run("1")  # events that are on their way
        assert opened.errors == []
    finally:
        opened.close()
