"""Dates and times in a reply: those that exist, and no others."""

import datetime
import json

import pytest
from grammar_walks import Walk, follows
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.grammars import json_grammar

DATE, TIME, BOTH = (
    json_grammar({"type": "string", "format": name}) for name in ("date", "time", "date-time")
)
NUMBERS = st.tuples(st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32))


def exists(year: int, month: int, day: int) -> bool:
    try:
        datetime.date(year, month, day)
    except ValueError:
        return False
    return True


@given(NUMBERS)
@example((0, 1, 1))
@example((1900, 2, 29))
@example((2000, 2, 29))
@example((2023, 2, 29))
@example((2024, 2, 29))
@example((2024, 2, 30))
@example((2024, 4, 31))
@example((9999, 12, 31))
def test_a_date_is_allowed_if_it_exists(numbers: tuple[int, int, int]) -> None:
    text = "{:04}-{:02}-{:02}".format(*numbers)
    assert follows(DATE, json.dumps(text)) == exists(*numbers)
    assert follows(BOTH, json.dumps(f"{text}T00:00:00Z")) == exists(*numbers)


OFFSETS = st.integers(-23 * 60, 23 * 60).map(
    lambda minutes: datetime.timezone(datetime.timedelta(minutes=minutes))
)


@given(st.datetimes(timezones=OFFSETS))
def test_every_time_is_allowed(moment: datetime.datetime) -> None:
    assert follows(BOTH, json.dumps(moment.isoformat()))
    assert follows(TIME, json.dumps(moment.timetz().isoformat()))


@pytest.mark.parametrize(
    "text", ["24:00:00Z", "12:60:00Z", "12:00:60Z", "12:00:00", "1:00:00Z", "12:00:00.Z", "12:00:00+24:00"]
)
def test_other_times_are_not(text: str) -> None:
    assert not follows(TIME, json.dumps(text))
    assert not follows(BOTH, json.dumps(f"2024-02-29T{text}"))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_can_be_read(seed: int) -> None:
    datetime.date.fromisoformat(json.loads(Walk(seed).answer(DATE)))
    datetime.datetime.fromisoformat(json.loads(Walk(seed).answer(BOTH)))


def test_a_format_beside_a_pattern() -> None:
    both = json_grammar(
        {"type": ["string", "null"], "format": "date", "pattern": "-29$", "allOf": [{"maxLength": 10}]}
    )
    assert [follows(both, text) for text in ('"2024-02-29"', '"2023-02-29"', '"2024-02-28"', "null")] == [
        True,
        False,
        False,
        True,
    ]
