"""The price book, and the worked examples of docs/pricing.md."""

import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.prices import Price, PriceBook, Usage, dollars

DOC = (Path(__file__).parent.parent / "docs" / "pricing.md").read_text()


def at(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


def test_the_shipped_entries() -> None:
    book = PriceBook.load()
    default = book.price_at(ClusterConfig().price_entry, at("2026-01-01"))
    assert (default.version, default.hit, default.miss, default.output) == (
        "v3.2-exp-launch@2025-09-29",
        70,
        140,
        420,
    )
    listed = book.price_at("v3.2-list", at("2026-01-01"))
    assert (listed.version, listed.hit, listed.miss, listed.output) == ("v3.2-list@2025-12-01", 28, 280, 420)


BOOK = """
plain:
  - {since: 2025-01-01, hit: 1, miss: 2, output: 3, source: a}
  - {since: 2025-06-01, hit: 4, miss: 5, output: 6, source: b}
"""


@pytest.fixture
def book(tmp_path: Path) -> PriceBook:
    (tmp_path / "prices.yaml").write_text(BOOK)
    return PriceBook.load(tmp_path / "prices.yaml")


@pytest.mark.parametrize(
    ("time", "version"),
    [
        ("2025-01-01T00:00:00", "plain@2025-01-01"),
        ("2025-05-31T23:59:59", "plain@2025-01-01"),
        ("2025-06-01T00:00:00", "plain@2025-06-01"),
        ("2030-01-01T00:00:00", "plain@2025-06-01"),
    ],
)
def test_a_price_is_valid_from_midnight_utc_of_its_date(book: PriceBook, time: str, version: str) -> None:
    assert book.price_at("plain", at(time)).version == version


def test_no_such_price(book: PriceBook) -> None:
    with pytest.raises(ValueError, match="starts on 2025-01-01"):
        book.price_at("plain", at("2024-12-31T23:59:59"))
    with pytest.raises(ValueError, match="no entry 'other', only plain"):
        book.price_at("other", at("2026-01-01"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("plain: []", "its dates must be there and rise"),
        (BOOK.replace("2025-06-01", "2024-06-01"), "its dates must be there and rise"),
        (BOOK.replace("2025-06-01", "2025-01-01"), "its dates must be there and rise"),
        (BOOK.replace("hit: 1", "hit: 0.5"), "Expected `int`"),
        (BOOK.replace("hit: 1", "hit: -1"), "Expected `int` >= 0"),
        (BOOK.replace("hit: 1", "hits: 1"), "unknown field `hits`"),
        (BOOK.replace(", source: a", ""), "missing required field `source`"),
    ],
)
def test_a_wrong_book_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"prices\.yaml: ") as caught:
        PriceBook.load(tmp_path / "prices.yaml")
    assert sentence in str(caught.value)


@given(*[st.integers(0, 10**6)] * 6)
def test_a_hit_more_saves_exactly_the_difference(
    hit: int, miss: int, output: int, a: int, b: int, c: int
) -> None:
    price = Price(version="x", hit=hit, miss=miss, output=output)
    before = price.charge(Usage(hit_tokens=a, miss_tokens=b + 64, output_tokens=c))
    after = price.charge(Usage(hit_tokens=a + 64, miss_tokens=b, output_tokens=c))
    assert before - after == 64 * (miss - hit)


@pytest.mark.parametrize(
    ("nanodollars", "text"),
    [(0, "$0.000000000"), (161_280, "$0.000161280"), (2_500_000_000, "$2.500000000"), (-1, "-$0.000000001")],
)
def test_dollars_are_exact(nanodollars: int, text: str) -> None:
    assert dollars(nanodollars) == text


@pytest.mark.parametrize(
    ("entry", "usage"),
    [
        ("v3.2-exp-launch", (0, 1000, 200)),
        ("v3.2-exp-launch", (960, 290, 150)),
        ("v3.2-list", (0, 1000, 200)),
        ("v3.2-list", (960, 290, 150)),
        ("v3.2-exp-launch", (0, 1000, 37)),
    ],
)
def test_the_worked_examples_are_in_the_documentation(entry: str, usage: tuple[int, int, int]) -> None:
    price = PriceBook.load().price_at(entry, at("2026-01-01"))
    hit, miss, output = usage
    amount = price.charge(Usage(hit_tokens=hit, miss_tokens=miss, output_tokens=output))
    assert f"{hit} x {price.hit} + {miss} x {price.miss} + {output} x {price.output} = {amount}" in DOC
