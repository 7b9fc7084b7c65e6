"""The benchmark runs every operator on tiny shapes and prints what a program can read."""

import json
from dataclasses import replace

import pytest

from kernels import bench
from kernels.bench_timing import Ceilings, sets_beyond_cache


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The lines of `python -m kernels.bench --small`."""
    with pytest.MonkeyPatch.context() as patch:
        lines = list[str]()
        patch.setattr("builtins.print", lambda text, **_: lines.extend(text.split("\n")))
        patch.setattr("kernels.bench_timing.MEASURED_SECONDS", 0.0)
        bench.main(["--small"])
    return lines


def test_every_part_is_measured_and_right(printed: list[str]) -> None:
    results = json.loads(printed[-1])["results"]
    assert {result["operator"].split()[0] for result in results} == {
        "expanded_mla",
        "sparse_mla",
        "select_tokens",
        "fp8_linear",
        "expert_mlp",
        "pack_pages",
        "unpack_pages",
    }
    for result in results:
        assert "failed" not in result, result
        assert result["error"] < 1e-9, result
        assert result["us"] > 0


def test_the_table_has_a_line_for_each_result(printed: list[str]) -> None:
    title, header, *lines, last = printed
    assert "TFLOP/s" in title
    assert header.split() == ["operator", "shape", "by", "us", "rate", "ceiling", "ours", "error"]
    assert len(lines) == len(json.loads(last)["results"])


def test_only_some_parts(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--small", "--only", "pages"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [result["operator"] for result in results] == 2 * ["pack_pages", "unpack_pages"]


def test_one_that_fails_does_not_hide_the_others() -> None:
    setting = bench.make_setting("cpu", small=True)
    maker = next(bench.PARTS["pages"].problems(setting))
    problem = maker()

    def fail(_: int) -> None:
        raise RuntimeError("no such kernel")

    calls = {"broken": fail, **problem.calls, "others": problem.calls["reference"]}
    broken, *others = bench.measure(lambda: replace(problem, calls=calls), setting, Ceilings(1.0, 1.0, 1.0))
    assert broken["failed"] == "RuntimeError: no such kernel"
    assert [record["by"] for record in others] == ["reference", "others"]
    assert others[1]["ours"] > 0


def test_the_lower_ceiling_counts() -> None:
    ceilings = Ceilings(bf16=1e3, fp8=2e3, copy=1e2)
    assert ceilings.seconds(flop=4e3, kind="bf16", num_bytes=1e2) == (4.0, True)
    assert ceilings.seconds(flop=4e3, kind="fp8", num_bytes=3e2) == (3.0, False)


def test_inputs_take_turns_until_they_exceed_the_cache() -> None:
    assert sets_beyond_cache(2**40) == 1
    assert sets_beyond_cache(30 * 2**20) == 4
    assert sets_beyond_cache(1) == 64
