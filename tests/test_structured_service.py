"""Replies in a format through the real service: all of them validate, also when a decode worker is killed in mid-stream."""

import pytest
from structured_replies import show

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def test_every_reply_validates_though_a_decode_worker_is_killed() -> None:
    figures = show(replies=12, kills=1)
    assert not figures.wrong
    assert figures.valid == 12
    assert len(figures.in_flight_at_kill) == 1
    assert figures.in_flight_at_kill[0] >= 1
    assert figures.resumed >= 1
