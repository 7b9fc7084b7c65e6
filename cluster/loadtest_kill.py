"""Kills processes in the middle of a load test, at set seconds: only those whose ids it was given, and only while they are the same.

A process id may be used again for another process, so the time at which each was started is noted before the test, and looked at again
before the kill.
"""

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kill:
    at_s: float
    pid: int


@dataclass(frozen=True)
class Killed:
    """What became of one. `reason`: why it was left alone."""

    at_s: float
    pid: int
    reason: str | None = None


def read(text: str) -> Kill:
    """SECONDS:PID, for argparse."""
    at, colon, pid = text.partition(":")
    try:
        kill = Kill(float(at), int(pid))
    except ValueError:
        kill = Kill(-1.0, 0)
    if not colon or not 0 <= kill.at_s < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not SECONDS:PID")
    if kill.pid <= 1 or kill.pid in (os.getpid(), os.getppid()):
        raise argparse.ArgumentTypeError(f"{text!r}: process {kill.pid} is not one to kill")
    return kill


class Schedule:
    """Raises ValueError where a process is not there to begin with."""

    def __init__(self, kills: Sequence[Kill]) -> None:
        self._kills = sorted(kills, key=lambda kill: kill.at_s)
        self._born = {kill.pid: _born(kill.pid) for kill in kills}
        self.done: list[Killed] = []
        for pid, born in self._born.items():
            if born is None:
                raise ValueError(f"there is no process {pid} to kill")

    async def run(self, now: Callable[[], float] = time.monotonic) -> None:
        """Kills each in its turn; cancel it when the test is over. `now`: seconds since the test began."""
        for kill in self._kills:
            await asyncio.sleep(max(0.0, kill.at_s - now()))
            self.done.append(Killed(now(), kill.pid, self._kill(kill.pid)))

    def _kill(self, pid: int) -> str | None:
        born = _born(pid)
        if born is None or born != self._born[pid]:
            return "it had ended before"
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError) as error:
            return str(error)
        return None


def _born(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where it is not there."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = about.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state == "Z" else fields[18]
