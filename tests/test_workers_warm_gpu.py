"""What a worker's start has warmed is all that requests need: none of them waits for a kernel to be compiled."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.config import EngineConfig
from workers.engine import Engine
from workers.request import Request, SamplingParams
from workers.start import Role, make_engine
from workers.tiny import write_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def serve(engine: Engine, longest: int) -> None:
    """Prompts of many lengths, alone and several at once, and each once more with some tokens added to what is cached."""
    generator = random.Random(0)
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    for number in range(40):
        for part in range(generator.choice([1, 1, 2, 5])):
            length = int(longest ** generator.random())
            prompt = [generator.randrange(10, 500) for _ in range(length + 200)]
            for end in (length, length + generator.randrange(1, 200)):
                name = f"{number}-{part}-{end}"
                engine.add(Request(name, prompt[:end], end, sampling, b"tenant"))
                if generator.random() < 0.7:
                    engine.step()
        while engine.has_work():
            engine.step()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_request_waits_for_a_compilation(
    tmp_path: Path, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    write_tiny(tmp_path, num_hidden_layers=2)
    config = EngineConfig(device="cuda:0", max_batched_tokens=512, max_running=8, cache_bytes=2**26)
    engine, _ = make_engine(tmp_path, config, role=role)
    compiled: list[str] = []

    def listen(*, src: Any, **_: object) -> None:
        compiled.append(src.fn.__name__)

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    try:
        serve(engine, 2500)
    finally:
        engine.close()
    assert not compiled
