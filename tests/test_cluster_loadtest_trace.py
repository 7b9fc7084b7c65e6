"""Traces in Mooncake's format: read strictly, made from a seed, turned into prompts that share what their blocks share."""

import itertools
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.loadtest_trace import BLOCK_TOKENS, MINUTE_MS, SLOT_MS, Entry, Prompts, Shape, make, read, write

# Lines as the Mooncake project publishes them.
PUBLISHED = """\
{"timestamp": 3000, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 0, "input_length": 1030, "output_length": 500, "hash_ids": [46, 57, 58]}

"""


def test_published_lines_are_read_by_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(PUBLISHED)
    first, second = read(path)
    assert (first.timestamp, first.input_length, first.output_length) == (0, 1030, 500)
    assert second.hash_ids == [46, 47]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("oops", "line 1: JSON is malformed"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', r"input_length"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": [1]}', r"timestamp"),
        ('{"timestamp": 0, "output_length": 1, "hash_ids": [1]}', r"missing required field `input_length`"),
        (
            '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
            r"1 blocks of 512 tokens",
        ),
        ("", "no requests"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=sentence) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.fixture(scope="module")
def made() -> list[Entry]:
    return make(Shape(), 7)


def test_a_made_trace_is_one_that_can_be_read_and_follows_from_its_seed(
    made: list[Entry], tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    write(made, path)
    assert read(path) == made == make(Shape(), 7)
    assert make(Shape(), 8) != made
    assert set(msgspec.json.decode(path.read_bytes().splitlines()[0])) == {
        "timestamp", "input_length", "output_length", "hash_ids",
    }  # fmt: skip


def test_a_made_trace_lies_within_its_shape(made: list[Entry]) -> None:
    shape = Shape()
    assert all(0 <= entry.timestamp < shape.minutes * MINUTE_MS for entry in made)
    assert all(entry.input_length <= shape.max_input for entry in made)
    assert 100 < len(made) < 400  # 60 sessions of 3 turns, less those cut off
    times = [entry.timestamp for entry in made]
    assert times == sorted(times)
    ids = [block for entry in made for block in entry.hash_ids]
    assert set(ids) == set(range(max(ids) + 1))


def test_a_made_trace_has_sessions_shared_beginnings_and_bursts(made: list[Entry]) -> None:
    starts = [entry.hash_ids[0] for entry in made]
    assert 1 < len(set(starts)) <= Shape().system_prompts
    seen: set[int] = set()
    hits = 0
    for entry in made:
        hits += len(seen & set(entry.hash_ids))
        seen.update(entry.hash_ids)
    assert 0.4 < hits / sum(len(entry.hash_ids) for entry in made) < 0.95
    assert any(
        len(earlier.hash_ids) > 2 and later.hash_ids[: len(earlier.hash_ids) - 1] == earlier.hash_ids[:-1]
        for earlier, later in itertools.combinations(made[:60], 2)
    ), "a later turn begins with the whole of an earlier one"
    slots = [0] * 20
    for entry in make(Shape(turns=1, sessions_per_minute=60), 7):
        slots[entry.timestamp // SLOT_MS] += 1
    assert max(slots) > 2 * min(slots)
    assert 450 < sum(slots) < 750  # 600 on average, bursts or not


def test_two_turns_of_a_session_never_share_a_block_in_part(made: list[Entry]) -> None:
    lengths: dict[int, set[int]] = {}
    for entry in made:
        for index, block in enumerate(entry.hash_ids):
            in_it = min(BLOCK_TOKENS, entry.input_length - index * BLOCK_TOKENS)
            lengths.setdefault(block, set()).add(in_it)
    assert all(len(each) == 1 for each in lengths.values())


blocks = st.lists(st.integers(0, 2**62), min_size=1, max_size=6)


@given(
    first=blocks,
    second=blocks,
    common=blocks,
    rest=st.integers(1, BLOCK_TOKENS),
    scale=st.sampled_from([16, 64, 512]),
)
def test_prompts_share_what_their_blocks_share(
    first: list[int], second: list[int], common: list[int], rest: int, scale: int
) -> None:
    prompts = Prompts(vocab_size=400, seed=1, block_tokens=scale)

    def entry(ids: list[int]) -> Entry:
        length = (len(ids) - 1) * BLOCK_TOKENS + rest
        return Entry(timestamp=0, input_length=length, output_length=9, hash_ids=ids)

    one, other = entry(common + first), entry(common + second)
    a, b = prompts.tokens(one), prompts.tokens(other)
    assert (len(a), len(b)) == (prompts.lengths(one)[0], prompts.lengths(other)[0])
    assert a[: len(common) * scale] == b[: len(common) * scale]
    assert all(100 <= token < 300 for token in a)  # the middle of the vocabulary
    if first[0] != second[0] and scale > 16 and min(len(a), len(b)) >= len(common) * scale + 16:
        assert a[len(common) * scale :][:16] != b[len(common) * scale :][:16]
    assert Prompts(vocab_size=400, seed=1, block_tokens=scale).tokens(one) == a


def test_lengths_scale_with_the_block() -> None:
    entry = Entry(timestamp=0, input_length=1024, output_length=100, hash_ids=[1, 2])
    assert Prompts(vocab_size=400, seed=0).lengths(entry) == (1024, 100)
    assert Prompts(vocab_size=400, seed=0, block_tokens=64).lengths(entry) == (128, 12)
    assert Prompts(vocab_size=400, seed=0, block_tokens=1).lengths(entry) == (2, 1)
