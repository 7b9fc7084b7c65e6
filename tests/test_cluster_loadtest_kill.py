import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.loadtest_kill import Kill, Schedule, read


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_process_is_killed_when_its_time_has_come(sleeper: subprocess.Popen[bytes]) -> None:
    schedule = Schedule([Kill(0.05, sleeper.pid)])
    assert sleeper.poll() is None
    asyncio.run(schedule.run(iter([0.0, 0.05]).__next__))
    assert sleeper.wait(20) == -signal.SIGKILL
    (killed,) = schedule.done
    assert (killed.pid, killed.at_s, killed.reason) == (sleeper.pid, 0.05, None)


def test_one_that_has_ended_is_left_alone_whoever_has_its_number_now(
    sleeper: subprocess.Popen[bytes],
) -> None:
    schedule = Schedule([Kill(0.0, sleeper.pid)])
    sleeper.kill()
    sleeper.wait()
    asyncio.run(schedule.run())
    assert schedule.done[0].reason == "it had ended before"


def test_another_process_under_the_same_number_lives(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule([Kill(0.0, sleeper.pid)])
    monkeypatch.setattr("cluster.loadtest_kill._born", lambda pid: "later")
    asyncio.run(schedule.run())
    assert schedule.done[0].reason == "it had ended before"
    assert sleeper.poll() is None


def test_what_is_not_there_cannot_be_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(ValueError, match=f"no process {process.pid}"):
        Schedule([Kill(1.0, process.pid)])


@pytest.mark.parametrize(
    "text",
    [
        *("5", "5:x", "-1:99", "inf:99", "5:0", "5:1", "5:-7"),
        pytest.param(f"5:{os.getpid()}", id="itself"),
        pytest.param(f"5:{os.getppid()}", id="its parent"),
    ],
)
def test_wrong_words_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


def test_right_words() -> None:
    assert read("2.5:4194300") == Kill(2.5, 4194300)
