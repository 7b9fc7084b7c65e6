"""The console in a real browser: a chat by keyboard, the live picture, errors. `tests/console_pictures.py` draws the README's."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from console_pictures import DESKTOP, ENGINE, ask, document
from headless_chromium import EXECUTABLE, MISSING, Page, opened_page
from in_process_gateway import Gateway, running_gateway

from cluster.config import ClusterConfig, TenantConfig
from demo.quiz import CHECKPOINT
from workers.tiny import write_tiny

KEY = "key-of-acme"

pytestmark = pytest.mark.skipif(EXECUTABLE is None and not os.environ.get("CI"), reason=MISSING)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(CHECKPOINT, folder, engine=ENGINE, each=2) as running:
        yield running


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """With a model of random weights, which hardly ever ends its answer."""
    folder = tmp_path_factory.mktemp("talkative")
    write_tiny(folder / "model", num_hidden_layers=2)
    with running_gateway(folder / "model", folder) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Without a worker, and with a tenant."""
    folder = tmp_path_factory.mktemp("guarded")
    tenant = TenantConfig(name="acme", keys=[hashlib.sha256(KEY.encode()).hexdigest()])
    with running_gateway(CHECKPOINT, folder, ClusterConfig(tenants=[tenant]), ENGINE, each=0) as running:
        yield running


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with opened_page(tmp_path / "browser") as opened:
        opened.look(**DESKTOP)
        yield opened


def _check(page: Page, gateway: Gateway) -> None:
    assert page.complaints() == []
    assert all(url.startswith((gateway.url, "data:image/svg+xml,")) for url in page.requested())
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0, "the page scrolls sideways"


def test_a_conversation_by_keyboard(page: Page, gateway: Gateway, tmp_path: Path) -> None:
    page.open(gateway.url)
    page.wait("document.activeElement.id === 'prompt'")
    page.wait("document.querySelector('#readiness').innerText === 'Ready'")
    page.tab_to("#settings summary")
    page.press("Enter")
    page.tab_to("#system")
    page.type(document())
    page.tab_to("#temperature")
    page.type("0")
    page.tab_to("#prompt")
    # Every text that the answer had on its way.
    page.evaluate("""window.seen = new Set();
        new MutationObserver(() => seen.add(document.querySelector('.answer > .text')?.innerText ?? ''))
            .observe(document.querySelector('#thread'), {childList: true, subtree: true, characterData: true})""")
    page.evaluate("""window.bars = 0;
        new MutationObserver(() => { bars += document.querySelectorAll('[role=progressbar]').length })
            .observe(document.querySelector('#thread'), {childList: true, subtree: true})""")
    ask(page, "What is the level of Linen Ibis?", 1)
    assert page.text(".answer > .text") == "The level of Linen Ibis is 2085."
    assert page.evaluate("[...seen].filter((text) => text && text.length < 30).length") > 3, (
        "it did not stream"
    )
    assert page.evaluate("bars") > 0
    assert "Cache hit\n0 tokens" in page.text(".bill")

    ask(page, "What is the size of Indigo Adder?", 2)
    second = page.evaluate("[...document.querySelectorAll('.answer')].at(-1).innerText")
    assert second.startswith("The size of Indigo Adder is 666.")
    told = httpx.get(f"{gateway.url}/console/state", timeout=10).json()["requests"]
    newest = told[0]
    assert newest["hit_tokens"] > 512
    assert f"Cache hit\n{newest['hit_tokens']} tokens" in second
    assert f"${newest['cost'].rstrip('0')}" in second
    page.wait("document.querySelectorAll('#requests tr').length === 2")
    page.wait("document.querySelector('#rate').innerText === '0'")  # nothing moves: the pictures agree
    row = page.text("#requests tr")
    assert newest["id"].removeprefix("chatcmpl-")[:8] in row
    assert f"{newest['hit_tokens']} of {newest['prompt_tokens']}" in row
    bars = page.evaluate(
        "[...document.querySelectorAll('#requests .track')].map((t) => [...t.children].map((part) => part.className))"
    )
    # No ship where the caches had landed before the first token came.
    parts = [["queue", "prefill", *["ship"] * (each["phases"]["ship"] > 0), "decode"] for each in told]
    assert bars == parts
    assert page.text("#prefill tr .state") == "2 of 2 pairs proven"
    assert page.evaluate("document.querySelectorAll('.workers tbody tr').length") == 4
    assert " cached, " in page.text("#decode tr")
    assert page.evaluate("document.querySelector('#hit-rate').innerText").endswith(" %")

    page.tab_to(".answer:last-of-type .route summary")
    page.press("Enter")
    assert (
        page.evaluate("[...document.querySelectorAll('.route')].at(-1).querySelectorAll('tbody tr').length")
        == 4
    )
    assert "the best of 4 pairs" in second
    for name, look in (
        ("light", DESKTOP),
        ("dark", DESKTOP | {"dark": True}),
        ("phone", {"width": 360, "height": 740}),
    ):
        page.look(**look)  # type: ignore[arg-type]
        page.picture(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
        _check(page, gateway)
    colours = "[document.body, document.querySelector('.chat')].map((e) => getComputedStyle(e).backgroundColor).join()"
    page.look(**DESKTOP)
    light = page.evaluate(colours)
    page.tab_to("#theme")
    page.press("Enter")
    assert page.evaluate(colours) != light
    assert page.evaluate("document.activeElement.ariaLabel") == "Use light colours"


def test_thinking_is_shown_apart_and_a_reply_can_be_stopped(page: Page, talkative: Gateway) -> None:
    page.open(talkative.url)
    page.tab_to("#settings summary")
    page.press("Enter")
    page.tab_to("#max-tokens")
    page.type("4")
    page.tab_to("#thinking")
    page.press(" ")
    ask(page, "<img src=x onerror=alert(1)>", 1)
    assert page.text(".question") == "<img src=x onerror=alert(1)>"
    assert page.evaluate("document.querySelectorAll('.thread img').length") == 0
    assert page.text(".thinking summary").startswith("Thought for ")
    assert page.evaluate("document.querySelector('.thinking .text').textContent.length") > 0
    assert page.text(".answer > .text") == ""
    assert "The answer reached its longest length." in page.text(".answer")

    page.evaluate("document.querySelector('#max-tokens').value = ''")
    page.tab_to("#prompt")
    page.type("one line")
    page.press("Enter", shift=True)
    page.type("and another")
    page.press("Enter")
    page.wait("document.querySelectorAll('.thinking').length === 2")
    assert page.evaluate("document.querySelector('#send').hidden")
    page.press("Escape")
    page.wait("!document.querySelector('#send').hidden")
    assert "You stopped this reply." in page.evaluate(
        "[...document.querySelectorAll('.answer')].at(-1).innerText"
    )
    page.wait("[...document.querySelectorAll('.outcome')].some((e) => e.innerText === 'cancelled')")
    assert "one line\nand another" in page.text(".question:nth-of-type(3)")

    page.tab_to("#new-chat")
    page.press("Enter")
    assert page.evaluate("document.querySelectorAll('.message').length") == 0
    assert page.evaluate("document.activeElement.id") == "prompt"
    _check(page, talkative)


def test_a_worker_that_drains_is_shown(page: Page, talkative: Gateway) -> None:
    """The last that `talkative` is good for."""
    page.open(talkative.url)
    page.wait("document.querySelector('#decode tr .state')?.innerText === '1 of 1 pair proven'")
    assert talkative.cluster.decodes[0].drain(10)
    page.wait("document.querySelector('#decode tr .state').innerText === 'draining'")


def test_errors_are_sentences_and_a_key_stays_in_its_tab(page: Page, guarded: Gateway) -> None:
    page.open(guarded.url)
    page.wait("document.querySelector('#trouble').innerText.includes('No API key')")
    assert page.evaluate("document.querySelector('#key').ariaInvalid") == "true"
    page.tab_to("#prompt")
    page.type("hello")
    page.press("Enter")
    page.wait("document.querySelector('.error')")
    assert "No API key: send" in page.text(".error p")
    assert page.text(".error code").startswith("chatcmpl-")
    page.tab_to("#key")
    page.type(KEY)
    page.press("Tab")
    page.wait("document.querySelector('#trouble').hidden")
    page.wait("document.querySelector('#model').innerText.startsWith('lightship')")
    assert page.text("#readiness") == "Waiting for a prefill and a decode worker"
    assert page.text("#no-workers").startswith("No worker has joined yet.")
    assert page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == (
        f'[{{}},{{"lightship.key":"{KEY}"}}]'
    )
    assert page.evaluate("document.cookie") == ""
    refused = "Failed to load resource: the server responded with a status of 401"
    assert [complaint for complaint in page.complaints() if not complaint.startswith(refused)] == []
