"""Bodies made from the service's own OpenAPI document: `python tests/fuzz.py --url http://127.0.0.1:8000 --bodies 1000`.

Every answer must be 2xx, or a 4xx that is OpenAI-shaped and says what is wrong; never 5xx, never nothing. Half of the bodies
of a kind keep to the document and half break it. A valid chat needs a conversation in order, which no schema can say: half of
those that keep to the document get one.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
TIMEOUT_S = 60.0
HELLO = [{"role": "user", "content": "hello"}]


def fuzz(client: httpx.Client, num_bodies: int, seed: int = 0) -> Counter[str]:
    """Sends so many bodies; how many answers there were of each kind. Raises AssertionError for a wrong one."""
    answers: Counter[str] = Counter()
    for path, mode in (kinds := [(path, mode) for path in PATHS for mode in GenerationMode]):
        for body in _bodies(_document(client), path, mode, -(-num_bodies // len(kinds)), seed):
            answers[f"{path} {mode.value}: {_check(client, path, body)}"] += 1
    return answers


def _document(client: httpx.Client) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/openapi.json").json()
    return document


def _bodies(
    document: dict[str, Any], path: str, mode: GenerationMode, count: int, seed: int
) -> Iterator[bytes]:
    strategy = schemathesis.openapi.from_dict(document)[path]["POST"].as_strategy(generation_mode=mode)
    bodies: list[bytes] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Any) -> None:
        bodies.append(case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode())

    collect()
    generator = random.Random(seed)
    for body in bodies[:count]:
        fields = json.loads(body) if mode is GenerationMode.POSITIVE else None
        if fields is not None and "messages" in fields and generator.random() < 0.5:
            body = json.dumps(fields | {"messages": HELLO}).encode()
        yield body


def _check(client: httpx.Client, path: str, body: bytes) -> str:
    """What kind of answer it was: its status, and for a refusal the field's name."""
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    what = f"{path} {body.decode(errors='replace')[:2000]} -> {answer.status_code} {answer.text[:500]}"
    if answer.is_success:
        if "event-stream" in answer.headers["content-type"]:
            assert answer.text.endswith("data: [DONE]\n\n"), what
        else:
            assert isinstance(answer.json(), dict), what
        return str(answer.status_code)
    assert 400 <= answer.status_code < 500, what
    error = answer.json()["error"]
    assert error["message"], what
    assert set(error) == {"message", "type", "param", "code"}, what
    return str(answer.status_code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--bodies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    headers = {"Authorization": f"Bearer {arguments.api_key}"}
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=TIMEOUT_S) as client:
        answers = fuzz(client, arguments.bodies, arguments.seed)
    for kind, count in sorted(answers.items()):
        print(f"{count:6} {kind}")
    print(json.dumps({"bodies": answers.total(), "answers": answers}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
