"""The service with its default model, as in the README: a document, questions about it in the terminal, the same over HTTP."""

import contextlib
import itertools
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from cluster.chat_encoding import Message
from cluster.chat_encoding_v32 import render
from cluster.tokenizer import Tokenizer
from demo.documents import Writer
from demo.patterns import HOLE
from demo.quiz import CHECKPOINT, MAX_ANSWER_TOKENS, load_tokenizer
from kernels.layout import PAGE_SIZE
from workers.config import EngineConfig
from workers.engine import Engine
from workers.model_config import ModelConfig
from workers.page_counts import PageCounts
from workers.request import Request, SamplingParams
from workers.start import make_engine

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parent.parent
SENTENCES, CANDIDATES = 54, 8


@dataclass(frozen=True)
class Asked:
    """A document, and two questions in one conversation about it that the model answers right."""

    document: str
    document_tokens: int
    questions: tuple[str, str]
    answers: tuple[str, str]
    fact_page: int  # where the value ends that the first question asks for
    selected_pages: list[list[int]]  # how often each layer selected each page for the first answer

    def messages(self) -> list[Message]:
        """The document and the first question."""
        return [
            Message(role="system", content=self.document),
            Message(role="user", content=self.questions[0]),
        ]


@dataclass(frozen=True)
class _Fact:
    question: str
    answer: str
    page: int


class _Plain:
    """One engine without a service, asked greedily."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(CHECKPOINT)
        self._library = load_tokenizer(CHECKPOINT)
        self._engine: Engine = make_engine(CHECKPOINT, EngineConfig(cache_bytes=16 * 2**20, threads=1))[0]
        self._numbers = itertools.count()

    def prompt(self, messages: list[Message]) -> list[int]:
        return self._tokenizer.encode(render(messages, thinking=False))

    def answer(self, messages: list[Message]) -> tuple[str, list[list[int]]]:
        """And how often each layer selected each page."""
        prompt = self.prompt(messages)
        sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
        counts = PageCounts(len(prompt))
        name = str(next(self._numbers))
        request = Request(name, list(prompt), len(prompt), sampling, b"plain", page_counts=counts)
        self._engine.add(request)
        while self._engine.has_work():
            self._engine.step()
        return self._library.decode(request.tokens[len(prompt) :]), counts.tolist()


def _document(seed: int) -> tuple[str, int, list[_Fact]]:
    """Its text, its number of tokens and what may be asked."""
    library = load_tokenizer(CHECKPOINT)
    written = Writer(library, "cpu").write(
        1,
        sentences=SENTENCES,
        facts=SENTENCES // 2,
        questions=CANDIDATES,
        generator=torch.Generator().manual_seed(seed),
        kinds=(1.0, 0.0, 0.0, 0.0),
    )

    def ids(part: torch.Tensor) -> list[int]:
        return [token for token in part.flatten().tolist() if token != HOLE]

    facts = []
    for number, place in enumerate(written.places[0].tolist()):
        value_end = 1 + len(ids(written.sentences[0, : place + 1])) - 2  # BOS before it, a full stop after it
        question, answer = (
            library.decode(ids(part[0, number])) for part in (written.questions, written.answers)
        )
        facts.append(_Fact(question, answer, page=value_end // PAGE_SIZE))
    document = ids(written.sentences[0])
    return library.decode(document), 1 + len(document), facts


def _two_right(plain: _Plain, seed: int) -> Asked | None:
    """The second question is asked after the answer to the first."""
    document, num_tokens, facts = _document(seed)
    turns, right, counts = [Message(role="system", content=document)], [], []
    for fact in facts:
        asking = [*turns, Message(role="user", content=fact.question)]
        answer, selected_pages = plain.answer(asking)
        if answer != fact.answer:
            continue
        right.append(fact)
        counts.append(selected_pages)
        turns = [*asking, Message(role="assistant", content=fact.answer)]
        if len(right) == 2:
            first, second = right
            questions, answers = (first.question, second.question), (first.answer, second.answer)
            return Asked(document, num_tokens, questions, answers, first.page, counts[0])
    return None


@pytest.fixture(scope="module")
def asked() -> Asked:
    plain = _Plain()
    found = next((found for seed in range(3) if (found := _two_right(plain, seed))), None)
    assert found, "the model answers too little right"
    assert 600 < found.document_tokens < 1000
    assert found.document_tokens > 5 * ModelConfig.load(CHECKPOINT).index_topk
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{url}/ready", timeout=5)
            if answer.status_code == 200 and len(answer.json()["pairs"]) == 1:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def url(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service that nothing but port and ledger was chosen for."""
    folder = tmp_path_factory.mktemp("service")
    port = _free_port()
    command = [sys.executable, "-m", "cluster.serve", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--set", f"ledger.url=sqlite:///{folder}/ledger.db"],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_ready(address, process, folder / "log")
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0


def _as_json(messages: list[Message]) -> Any:
    return [{"role": message.role, "content": message.content} for message in messages]


def test_questions_in_the_terminal_are_answered_right(url: str, asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "document.txt"
    path.write_text(asked.document)
    command = [
        sys.executable,
        "-m",
        "cluster.chat",
        "--url",
        url,
        "--document",
        str(path),
        "--temperature",
        "0",
    ]
    for question in asked.questions:
        command += ["--ask", question]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    replies = [lines.index(f"> {question}") for question in asked.questions]
    for start, answer in zip(replies, asked.answers, strict=True):
        assert lines[start + 2] == answer  # after how far the prompt was read
    hits = [int(found) for found in re.findall(r"^prompt \d+ \(hit (\d+)", done.stdout, re.M)]
    assert hits[0] == 0
    assert hits[1] >= asked.document_tokens // PAGE_SIZE * PAGE_SIZE


def test_the_openai_sdk_gets_the_same_answer(url: str, asked: Asked) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="lightship", messages=_as_json(asked.messages()), temperature=0
    )
    assert answer.choices[0].message.content == asked.answers[0]
    assert answer.choices[0].finish_reason == "stop"


def test_the_page_with_the_fact_is_read(url: str, asked: Asked) -> None:
    body = {
        "model": "lightship",
        "messages": _as_json(asked.messages()),
        "temperature": 0,
        "debug": {"selected_pages": True},
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == asked.answers[0]
    model = ModelConfig.load(CHECKPOINT)
    counts = answer["debug"]["selected_pages"]
    rows = answer["usage"]["completion_tokens"] - 1  # the first token was written by the prefill worker
    assert [sum(of_layer) for of_layer in counts] == [rows * model.index_topk] * model.num_hidden_layers
    assert any(of_layer[asked.fact_page] for of_layer in counts)
    assert counts == asked.selected_pages
