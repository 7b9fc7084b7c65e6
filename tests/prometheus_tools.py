"""Debian's Prometheus and its promtool, for tests: started on a port and a folder of their own."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

SCRAPE_S = 1


def find(name: str) -> str:
    """The program's path. Skips the test where it is missing, but fails in continuous integration, which installs it."""
    path = shutil.which(name)
    if path is None and "CI" in os.environ:
        pytest.fail(f"{name} is not installed; .ci/run should have")
    if path is None:
        pytest.skip(f"{name} is not installed: Debian's package prometheus has it")
    return path


class Prometheus:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query. Raises where Prometheus does not take the expression."""
        answer = self._http.post("/api/v1/query", data={"query": expression})
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        result = answer.json()["data"]["result"]
        assert isinstance(result, list)
        return result

    def get(self, path: str) -> Any:
        answer = self._http.get(path)
        answer.raise_for_status()
        return answer.json()["data"]

    def answers(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False


@contextlib.contextmanager
def running_prometheus(folder: Path, target: str, rules: Path | None = None) -> Iterator[Prometheus]:
    """Scrapes `target` (host:port) every second until the block ends."""
    program = find("prometheus")
    config = folder / "prometheus.yml"
    config.write_text(
        f"global: {{scrape_interval: {SCRAPE_S}s, evaluation_interval: {SCRAPE_S}s}}\n"
        f"rule_files: [{'' if rules is None else rules}]\n"
        f"scrape_configs: [{{job_name: lightship, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as http:
            prometheus = Prometheus(http)
            wait_for(prometheus.answers)
            yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], bool], *, what: object = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come true: {what}"
        time.sleep(0.1)
