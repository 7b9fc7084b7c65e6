"""The whole service in processes of its own, two prefill and two decode workers on a local Ray, for tests of it over HTTP."""

import contextlib
import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from workers.model_config import ModelConfig
from workers.tiny import write_tiny

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"alpha": "key-of-alpha", "beta": "key-of-beta"}
PAGES = 320  # of each worker


@dataclass
class Service:
    url: str
    ledger: str
    process: subprocess.Popen[bytes]
    token_bytes: int

    def client(self, tenant: str = "alpha") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=_authorization(tenant), timeout=60)

    def async_client(self, tenant: str = "alpha") -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        return httpx.AsyncClient(
            base_url=self.url, headers=_authorization(tenant), timeout=120, limits=limits
        )

    def metrics(self) -> dict[str, dict[str, float]]:
        """Metric name -> {"role/worker" or "": value}."""
        values: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=10).text):
            for sample in family.samples:
                who = "/".join(sample.labels[k] for k in ("role", "worker") if k in sample.labels)
                by_worker = values.setdefault(sample.name, {})
                by_worker[who] = by_worker.get(who, 0.0) + sample.value
        return values

    def workers(self) -> dict[str, int]:
        """Worker -> process id."""
        answer = httpx.get(f"{self.url}/ready", timeout=10).json()
        return {info["worker"]: info["pid"] for info in answer["workers"]}

    def wait_ready(self, pairs: int = 4, timeout: float = 90) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{self.url}/ready", timeout=5)
                if answer.status_code == 200 and len(answer.json()["pairs"]) == pairs:
                    return
            time.sleep(0.2)
        raise AssertionError(f"not ready after {timeout} s")

    def wait_idle(self, timeout: float = 30) -> None:
        """Until no worker holds a page or a request."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            values = self.metrics()
            names = (
                "lightship_held_pages",
                "lightship_num_requests_running",
                "lightship_num_requests_waiting",
            )
            if not any(sum(values[name].values()) for name in names):
                return
            time.sleep(0.2)
        raise AssertionError("pages or requests are still held")


def _authorization(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[tenant]}"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_service(folder: Path) -> Iterator[Service]:
    """Started with an empty `folder`, where it writes everything; stopped as by Ctrl-C."""
    write_tiny(folder / "model", num_hidden_layers=2)
    model = ModelConfig.load(folder / "model")
    token_bytes = model.cache_layout(True).token_bytes * model.num_hidden_layers
    engine = {
        "cache_bytes": PAGES * 64 * token_bytes,
        "threads": 1,
        "max_context": 12_000,
        "max_running": 256,
    }
    port = _free_port()
    ledger = f"sqlite:///{folder}/ledger.db"
    config = {
        "model": str(folder / "model"),
        "port": port,
        "prefill": {"workers": 2, "engine": engine},
        "decode": {"workers": 2, "engine": engine},
        "ledger": {"url": ledger},
        "tenants": [
            {"name": name, "keys": [hashlib.sha256(key.encode()).hexdigest()]} for name, key in KEYS.items()
        ],
    }
    (folder / "cluster.yaml").write_text(json.dumps(config))
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.serve", "--config", str(folder / "cluster.yaml")],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    running = Service(f"http://127.0.0.1:{port}", ledger, process, token_bytes)
    try:
        try:
            running.wait_ready(timeout=150)
        except AssertionError:
            raise AssertionError((folder / "log").read_text()) from None
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        log.close()
