"""The whole service as a user starts it: two prefill and two decode workers on a local Ray, over HTTP."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from service_process import KEYS, PAGES, Service, running_service

from cluster import chat
from cluster.ledger import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


def _ids(seed: int, num_tokens: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(20, 270) for _ in range(num_tokens)]


def _body(prompt: list[int], **more: Any) -> dict[str, Any]:
    fixed = {"model": "lightship", "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return {**fixed, **more}


def _complete(client: httpx.Client, prompt: list[int], **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=_body(prompt, **more))
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])


def test_a_shared_prefix_is_found_and_billed(service: Service) -> None:
    shared = _ids(1, 1000)
    with service.client() as client:
        first = _complete(client, shared + _ids(2, 70))["usage"]
        second = _complete(client, shared + _ids(3, 90))["usage"]
    assert first["prompt_cache_hit_tokens"] == 0
    assert second["prompt_cache_hit_tokens"] == 960  # 15 units of 64
    assert second["prompt_cache_miss_tokens"] == 1090 - 960
    assert second["prompt_tokens_details"]["cached_tokens"] == 960
    assert second["cost_nanodollars"] == 960 * 70 + 130 * 140 + 8 * 420
    with service.client("beta") as other:
        assert _complete(other, shared + _ids(3, 90))["usage"]["prompt_cache_hit_tokens"] == 0


def test_prefill_and_decode_are_different_processes(service: Service) -> None:
    workers = service.workers()
    assert sorted(worker.split("-")[0] for worker in workers) == ["decode", "decode", "prefill", "prefill"]
    assert len(set(workers.values())) == 4
    for pid in workers.values():
        os.kill(pid, 0)


def test_shipped_bytes_are_exactly_the_caches(service: Service) -> None:
    def shipped() -> float:
        return sum(service.metrics()["lightship_shipped_bytes_total"].values())

    prompt = _ids(10, 64 * 9 + 5)
    with service.client() as client:
        before = shipped()
        _complete(client, prompt)
        service.wait_idle()
        time.sleep(0.5)
        once = shipped() - before
        assert once == 10 * 64 * service.token_bytes
        longer = _complete(client, prompt + _ids(11, 128))  # the decode worker may hold the first nine pages
        service.wait_idle()
        time.sleep(0.5)
        again = shipped() - before - once
    assert longer["usage"]["prompt_cache_hit_tokens"] == 9 * 64
    assert again == 3 * 64 * service.token_bytes  # only the rest


def test_cancelled_requests_leave_nothing_behind(service: Service) -> None:
    generator = random.Random(5)

    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = _body(_ids(1000 + index, generator.randrange(10, 500)), max_tokens=generator.randrange(1, 40))
        patience = generator.choice([0.001, 0.05, 0.2, 0.6, 1.5, 60])

        async def run() -> None:
            if index % 2:
                async for _ in _stream(client, body):
                    pass
            else:
                await client.post("/v1/completions", json=body)

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(run(), patience)

    async def all_of_them() -> None:
        async with service.async_client() as client:
            gate = asyncio.Semaphore(24)

            async def gated(index: int) -> None:
                async with gate:
                    await one(client, index)

            await asyncio.gather(*(gated(index) for index in range(200)))

    asyncio.run(all_of_them())
    service.wait_idle()
    values = service.metrics()
    for worker in service.workers():
        who = f"{worker.split('-')[0]}/{worker}"
        free, cached = values["lightship_free_pages"][who], values["lightship_cached_pages"][who]
        assert free + cached == PAGES
    assert sum(values["lightship_requests_in_progress"].values()) == 0


async def _eight_texts(service: Service, tenant: str, kill: str | None) -> list[str]:
    """Of long streams side by side, in the midst of which a worker of the role `kill` is killed."""
    async with service.async_client(tenant) as client:

        async def text(prompt: list[int]) -> str:
            chunks = [c async for c in _stream(client, _body(prompt, max_tokens=60))]
            return "".join(c["choices"][0]["text"] for c in chunks if c["choices"])

        prompts = [_ids(2000 + index, 150 + 40 * index) for index in range(8)]
        streams = [asyncio.create_task(text(prompt)) for prompt in prompts]
        if kill:
            await asyncio.sleep(0.7)
            victim = next(pid for worker, pid in service.workers().items() if worker.startswith(kill))
            os.kill(victim, signal.SIGKILL)
        return await asyncio.gather(*streams)


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[str]:
    return asyncio.run(_eight_texts(service, "alpha", None))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_worker_costs_time_but_no_token(service: Service, undisturbed: list[str], role: str) -> None:
    before = set(service.workers())
    assert asyncio.run(_eight_texts(service, "beta", role)) == undisturbed
    service.wait_ready()
    new = set(service.workers()) - before
    assert [worker.split("-")[0] for worker in new] == [role]
    who = f"{role}/{new.pop()}"
    unused = service.metrics()["lightship_cached_pages"][who]

    async def more() -> None:
        async with service.async_client() as client:
            bodies = [_body(_ids(3000 + index, 300)) for index in range(8)]
            await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    asyncio.run(more())  # more than one worker takes at once
    service.wait_idle()
    assert service.metrics()["lightship_cached_pages"][who] > unused


def _process(service: Service, title: str) -> int:
    """The process of that title among those this service started."""
    parents, titles = {}, {}
    for line in subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        pid, parent, args = line.split(None, 2)
        parents[int(pid)], titles[int(pid)] = int(parent), args
    for pid, args in titles.items():
        ancestor = pid
        while ancestor and ancestor != service.process.pid:
            ancestor = parents.get(ancestor, 0)
        if ancestor and args.startswith(title):
            return pid
    raise AssertionError(f"no process is called {title}")


def test_a_killed_controller_stops_no_stream_and_comes_back(service: Service) -> None:
    prompt = _ids(4000, 100)
    with service.client() as client:
        undisturbed = _complete(client, prompt, max_tokens=100)["choices"][0]["text"]

    async def stream() -> str:
        async with service.async_client("beta") as client:
            text = ""
            async for chunk in _stream(client, _body(prompt, max_tokens=100)):
                text += "".join(choice["text"] for choice in chunk["choices"])
                if len(text) > 20 and not killed:
                    os.kill(_process(service, "ray::PrefixCacheController"), signal.SIGKILL)
                    killed.append(True)
            return text

    killed: list[bool] = []
    assert asyncio.run(stream()) == undisturbed
    deadline = time.monotonic() + 60
    with service.client() as client:  # 503 while nothing can be billed
        while (status := client.post("/v1/completions", json=_body(prompt)).status_code) == 503:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert status == 200
        repeated = _complete(client, prompt)["usage"]
    assert repeated["prompt_cache_hit_tokens"] == 64
    service.wait_idle()


def test_a_killed_gateway_closes_its_streams_and_leaves_nothing_behind(service: Service) -> None:
    async def stream(client: httpx.AsyncClient, number: int) -> bool:
        """Whether it ended with an error, which it must."""
        try:
            chunks = [c async for c in _stream(client, _body(_ids(5000 + number, 200), max_tokens=400))]
        except httpx.HTTPError:
            return True
        return bool(chunks) and "error" in chunks[-1]

    async def load() -> list[bool]:
        async with service.async_client() as client:
            streams = [asyncio.create_task(stream(client, number)) for number in range(4)]
            await asyncio.sleep(2.0)
            os.kill(_process(service, "ray::ServeReplica:lightship:gateway"), signal.SIGKILL)
            return await asyncio.gather(*streams)

    assert asyncio.run(load()) == [True] * 4
    service.wait_ready()
    service.wait_idle()
    deadline = time.monotonic() + 40  # orphans are settled after a grace period
    while verify(service.ledger).unsettled:
        assert time.monotonic() < deadline
        time.sleep(1.0)


def test_the_openai_sdk_works(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEYS["alpha"], max_retries=0)
    assert [model.id for model in client.models.list()] == ["lightship"]
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    chat = client.chat.completions.create(
        model="lightship", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 12
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == chat.usage.completion_tokens
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in logprobs.content)
    stream = client.chat.completions.create(
        model="lightship",
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chat.usage.total_tokens
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == (chat.choices[0].message.content or "")
    completion = client.completions.create(
        model="lightship", prompt="Once upon", max_tokens=6, logprobs=2, seed=3
    )
    assert completion.choices[0].logprobs is not None
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x", max_tokens=1)


def test_progress_and_what_was_read(service: Service) -> None:
    prompt, debug = _ids(6000, 700), {"selected_pages": True}
    wanted = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
    with service.client() as client:
        for again in (False, True):
            answer = client.post("/v1/completions", json=_body(prompt, debug=debug, **wanted))
            chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
            assert [chunk["choices"] for chunk in chunks[: len(progress)]] == [[]] * len(progress)
            assert progress[-1] == {"total": 700, "cache": 640 * again, "processed": 700}
            assert chunks[-1]["usage"]["prompt_cache_hit_tokens"] == 640 * again
            counts = chunks[-1]["debug"]["selected_pages"]
            assert [sum(of_layer) for of_layer in counts] == [7 * 64] * 2  # rows x top-k
            assert not any("debug" in chunk for chunk in chunks[:-1])
        plain, counted = _complete(client, prompt), _complete(client, prompt, debug=debug)
    assert plain["choices"] == counted["choices"]
    assert "debug" not in plain
    assert counted["debug"] == {"selected_pages": counts}


def test_questions_about_a_document(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text"
    path.write_text("It was a bright cold day in April. " * 20)
    options = ["--url", service.url, "--api-key", KEYS["alpha"], "--max-tokens", "5", "--document", str(path)]
    assert chat.main([*options, "--ask", "When?", "--ask", "How was it?"]) == 0
    hits = [int(found) for found in re.findall(r"^prompt \d+ \(hit (\d+)", capsys.readouterr().out, re.M)]
    assert hits[0] == 0
    assert hits[1] >= 64
    path.write_text("x" * 5_000_000)
    assert chat.main([*options, "--ask", "When?"]) == 1
    assert "HTTP 413: the body is larger than 4194304 bytes" in capsys.readouterr().out


BAD = {  # body or fields of it -> status and what the message names
    "not JSON": (b"{", 400, "JSON"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "UTF-8"),
    "too large": (b" " * 10_000_000, 413, "4194304"),
    "unknown model": ({"model": "gpt-4"}, 404, "gpt-4"),
    "no model": ({"model": None}, 400, "model"),
    "negative max_tokens": ({"max_tokens": -1}, 400, "max_tokens"),
    "huge max_tokens": ({"max_tokens": 10**9}, 400, "12000"),
    "NaN": (b'{"model": "lightship", "prompt": "x", "temperature": NaN}', 400, "JSON"),
    "hot": ({"temperature": 3}, 400, "temperature"),
    "wrong type": ({"prompt": 7}, 400, "prompt"),
    "unknown token": ({"prompt": [10**6]}, 400, "prompt[0]"),
    "longer than the context": ({"prompt": [20] * 12_001}, 400, "12000"),
    "unknown field": ({"wat": 1}, 400, "wat"),
    "progress without a stream": ({"return_progress": True}, 400, "return_progress"),
    "unknown debug field": ({"debug": {"wat": True}}, 400, "wat"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_no_worker_sees_it(service: Service, name: str) -> None:
    wrong, status, mention = BAD[name]
    content = wrong if isinstance(wrong, bytes) else json.dumps({**_body([20, 21]), **wrong}).encode()
    with service.client() as client:
        # A pair that is new, after a worker was killed, is proven by a request of the gateway's own; not every time, though.
        for _ in range(5):
            before = _seen_by_workers(service)
            answer = client.post("/v1/completions", content=content)
            assert answer.status_code == status
            error = answer.json()["error"]
            assert mention in error["message"]
            assert set(error) == {"message", "type", "param", "code"}
            if _seen_by_workers(service) == before:
                return
    raise AssertionError("workers saw something every time")


def test_bad_chats_keys_and_paths(service: Service) -> None:
    with service.client() as client:
        for messages, mention in (
            ([], "messages"),
            ([{"role": "wizard", "content": "x"}], "messages[0].role"),
            ([{"role": "user"}], "messages[0].content"),
        ):
            answer = client.post("/v1/chat/completions", json={"model": "lightship", "messages": messages})
            assert answer.status_code == 400
            assert mention in answer.json()["error"]["message"]
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/v1/completions").status_code == 405
        assert (
            client.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"}).status_code
            == 415
        )
    assert httpx.post(f"{service.url}/v1/completions", json=_body([20])).status_code == 401
    assert httpx.get(f"{service.url}/health").json() == {"status": "ok"}


def _seen_by_workers(service: Service) -> float:
    return sum(service.metrics()["lightship_shipments_total"].values())


def test_the_ledger_verifies_and_every_request_is_settled(service: Service) -> None:
    with service.client() as client:
        _complete(client, _ids(77, 100))
    time.sleep(1.0)
    report = verify(service.ledger)
    assert report.bad is None
    assert report.unsettled == 0
    assert report.records > 2
