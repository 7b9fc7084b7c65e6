"""The trained model through real workers: what a plain engine answers right is answered right by any path through the cluster."""

import asyncio
import threading
from collections.abc import Iterator

import msgspec
import pytest
from in_process_cluster import CONFIG, Cluster, alone, collect

from cluster.fleet import Fleet
from cluster.flight import Flight, Pilot
from demo.documents import SINGLE
from demo.quiz import CHECKPOINT, KINDS, MAX_ANSWER_TOKENS, Quiz, load_tokenizer, make_quiz
from workers.model_config import ModelConfig
from workers.page_hash import page_hashes
from workers.request import SamplingParams

ROOM = msgspec.structs.replace(CONFIG, cache_bytes=40 * 2**20)


@pytest.fixture(scope="module")
def quiz() -> Quiz:
    """Facts asked of a document of many times top-k."""
    quiz = make_quiz(load_tokenizer(CHECKPOINT), tokens=1200, questions=12, seed=3)
    facts = [question for question in quiz.questions if question.kind == KINDS[SINGLE]][:6]
    assert len(facts) == 6
    assert len(quiz.document) > 10 * ModelConfig.load(CHECKPOINT).index_topk
    return Quiz(quiz.document, facts)


def flights(quiz: Quiz, name: str) -> list[Flight]:
    made = []
    for number, question in enumerate(quiz.questions):
        prompt = [*quiz.document, *question.prompt]
        made.append(
            Flight(
                id=f"{name}-{number}",
                prompt=prompt,
                sampling=SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0),
                namespace=name.encode(),
                page_hashes=page_hashes(name.encode(), prompt),
            )
        )
    return made


@pytest.fixture(scope="module")
def expected(quiz: Quiz) -> list[list[int]]:
    """One plain engine's answers, all of them right: these tests are about what is said, not only about equal tokens."""
    answers = alone(CHECKPOINT, flights(quiz, "alone"))
    right = [answer == question.answer for answer, question in zip(answers, quiz.questions, strict=True)]
    assert all(right)
    return answers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    running = Cluster(CHECKPOINT, ROOM)
    yield running
    running.stop()


def test_one_after_another_with_prefix_hits(cluster: Cluster, quiz: Quiz, expected: list[list[int]]) -> None:
    """In chunks of 192 tokens; from the second question on, the document comes from the cache."""
    asked = flights(quiz, "in turn")

    async def work(pilot: Pilot, _: Fleet) -> None:
        for flight in asked:
            await collect(pilot.fly(flight))

    cluster.run(work)
    assert [flight.emitted for flight in asked] == expected
    whole_pages = len(quiz.document) // 64 * 64
    assert [flight.num_hit for flight in asked] == [0] + [whole_pages] * (len(asked) - 1)


def test_after_killed_workers(quiz: Quiz, expected: list[list[int]]) -> None:
    """A decode worker is lost in the middle of an answer, and a prefill worker while others are being read."""
    cluster, asked = Cluster(CHECKPOINT, ROOM), flights(quiz, "killed")

    async def work(pilot: Pilot, _: Fleet) -> None:
        async def fly(flight: Flight) -> None:
            async for _ in pilot.fly(flight):
                if flight is asked[0] and len(flight.emitted) == 4:
                    threading.Thread(target=cluster.decodes[0].stop).start()
                if flight is asked[0] and len(flight.emitted) == 2:
                    threading.Thread(target=cluster.prefills[0].stop).start()

        await asyncio.gather(*(fly(flight) for flight in asked))

    try:
        cluster.run(work)
        assert [flight.emitted for flight in asked] == expected
        assert any(flight.restarts for flight in asked)
    finally:
        cluster.stop()
