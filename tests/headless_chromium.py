"""Debian's Chromium without a window, driven by the Chrome DevTools protocol: keys in, pictures and complaints out."""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

EXECUTABLE = shutil.which("chromium")
MISSING = "CHROMIUM IS MISSING, so the console was not tested: apt-get install chromium. .ci/run installs it and does not skip."
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-port=0",
)
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), " ": (32, " ")}
TIMEOUT_S = 60.0
# What the system's font is on a machine without a desktop is chance: Inter, where it is installed.
FONTS = """<fontconfig>
  <include>/etc/fonts/fonts.conf</include>
  <match target="pattern"><test name="family"><string>sans</string></test><edit name="family" mode="prepend" binding="strong"><string>Inter</string></edit></match>
  <match target="pattern"><test name="family"><string>sans-serif</string></test><edit name="family" mode="prepend" binding="strong"><string>Inter</string></edit></match>
  <match target="pattern"><test name="family"><string>system-ui</string></test><edit name="family" mode="prepend" binding="strong"><string>Inter</string></edit></match>
</fontconfig>"""


class Page:
    """One tab. `events` are what the browser has told of it so far."""

    def __init__(self, socket: ClientConnection) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._session: str | None = None
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The browser's answer to a command of the protocol."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=TIMEOUT_S))
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def look(self, *, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """The size of the window, and what the system prefers: with less motion, pictures are the same at any moment."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.command("Emulation.setEmulatedMedia", features=[scheme, motion])

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        answer = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if self.evaluate(f"Boolean({expression})"):
                return
            time.sleep(0.02)
        raise AssertionError(f"never became true: {expression}\n{self.evaluate('document.body.innerText')}")

    def text(self, selector: str) -> str:
        """What is to be read at the first element that matches."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.command("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        fields = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
        self.command("Input.dispatchKeyEvent", type="keyUp", **fields)

    def tab_to(self, selector: str) -> None:
        """Presses Tab until the element has the focus, as someone without a mouse would."""
        for _ in range(40):
            if self.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            self.press("Tab")
        raise AssertionError(f"Tab never came to {selector}")

    def picture(self, path: Path) -> None:
        """A screenshot as a small PNG: of 256 colours, none of them visibly another."""
        shot = base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])
        colours = Image.open(io.BytesIO(shot)).convert("RGB")
        colours.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)

    def complaints(self) -> list[str]:
        """Errors and warnings of the page and of the browser about it."""
        self.evaluate("0")  # what has happened has been told now
        found = []
        for event in self.events:
            method, told = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(str(told["args"]))
            elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(f"{told['entry']['text']} {told['entry'].get('url')}")
        return found

    def requested(self) -> set[str]:
        """Every address that the page asked for, or tried to."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return {event["params"]["request"]["url"] for event in sent}


@contextlib.contextmanager
def opened_page(folder: Path) -> Iterator[Page]:
    """A page of a browser of its own, until the block ends. `folder` gets the browser's files."""
    assert EXECUTABLE is not None, MISSING
    folder.mkdir(exist_ok=True)
    fonts = folder / "fonts.conf"
    fonts.write_text(FONTS)
    browser = subprocess.Popen(
        [EXECUTABLE, *ARGUMENTS, f"--user-data-dir={folder}"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"FONTCONFIG_FILE": str(fonts)},
    )
    assert browser.stderr is not None
    try:
        told = ""
        while (address := re.search(r"DevTools listening on (ws://\S+)", told)) is None:
            line = browser.stderr.readline()
            assert line, f"Chromium ended: {told}"
            told += line
        with connect(address[1], max_size=None) as socket:
            yield Page(socket)
    finally:
        browser.terminate()
        browser.wait(20)
        browser.stderr.close()
