"""Draws the README's pictures of the console, while its cluster is busy: `PYTHONPATH=. .venv/bin/python tests/console_pictures.py`.

The demo's model on two workers of each role, in this process; Debian's packages chromium and fonts-inter.
"""

import tempfile
import threading
from pathlib import Path
from typing import Any

import httpx
from headless_chromium import Page, opened_page
from in_process_gateway import Gateway, running_gateway

from demo.quiz import CHECKPOINT
from workers.config import EngineConfig

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "images"
MAX_BYTES = 200_000
ENGINE = EngineConfig(max_batched_tokens=256, cache_bytes=12 * 2**20, max_context=4096, threads=1)
DESKTOP = {"width": 1440, "height": 900}
QUESTIONS = ("What is the level of Linen Ibis?", "What is the size of Indigo Adder?")


def document() -> str:
    """The first part of the demo's specification: facts that its model finds."""
    text = (ROOT / "demo" / "spec.txt").read_text()
    return text[: text.index("##", 2000)]


def ask(page: Page, question: str, replies: int) -> None:
    """By keyboard; returns once there are so many whole replies."""
    page.tab_to("#prompt")
    page.type(question)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.bill').length === {replies}")


def draw(page: Page, gateway: Gateway) -> None:
    page.look(**DESKTOP)
    page.open(gateway.url)
    page.evaluate(f"document.querySelector('#system').value = {document()!r}")
    page.evaluate("document.querySelector('#temperature').value = '0'")
    for number, question in enumerate(QUESTIONS):
        ask(page, question, number + 1)
    page.evaluate("[...document.querySelectorAll('.route')].at(-1).open = true")
    threads = [threading.Thread(target=_work, args=(gateway, number)) for number in range(4)]
    for thread in threads:
        thread.start()
    page.wait(
        "[...document.querySelectorAll('.outcome')].filter((e) => e.innerText === 'writing').length >= 3"
    )
    page.wait("Number(document.querySelector('#rate').innerText) > 5")
    for name, dark in (("light", False), ("dark", True)):
        page.look(**DESKTOP, dark=dark)
        path = FOLDER / f"console-{name}.png"
        page.picture(path)
        assert path.stat().st_size < MAX_BYTES, path
    for thread in threads:
        thread.join()


def _work(gateway: Gateway, number: int) -> None:
    """A request as from elsewhere: a part of the document again, then something of its own."""
    prompt = document()[: 900 * (number + 1)] + f" Of {number}:"
    body: dict[str, Any] = {"model": "lightship", "prompt": prompt, "max_tokens": 120, "ignore_eos": True}
    httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=120).raise_for_status()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (
            running_gateway(CHECKPOINT, folder, engine=ENGINE, each=2) as gateway,
            opened_page(folder / "browser") as page,
        ):
            draw(page, gateway)


if __name__ == "__main__":
    main()
