"""The demo overlay's Serve section, deployed as the operator deploys it, on a Ray cluster of the overlay's pods' shape: one node for
each pod, with its group's labels, CPUs and environment. Proves the application, the placement and the probes; Kubernetes is not there.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kubernetes_objects import ROOT, container, environment, groups, of_kind, overlay

from cluster.key_store import KeyStore

NAME = "cpu-demo"
# Starts the nodes as the groups say, prints {"ports": ..., "nodes": ...} and waits for the end of its input.
NODES = """
import json, sys
from ray.cluster_utils import Cluster
groups, dashboard, agent = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agent})
nodes = {}
for group in groups:
    for _ in range(group["replicas"]):
        node = cluster.add_node(num_cpus=group["cpus"], labels=group["labels"], dashboard_agent_listen_port=0)
        nodes[node.node_id] = group["name"]
print(json.dumps(nodes), flush=True)
input()
cluster.shutdown()
"""


@dataclass
class Nodes:
    dashboard: str
    agent: str
    groups: dict[str, str]  # node id -> group


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    workers = [
        {
            "name": name,
            "replicas": group["replicas"],
            "labels": group["labels"],
            "cpus": int(container(group)["resources"]["limits"]["cpu"]),
        }
        for name, group in groups(overlay(NAME)).items()
        if name != "head"
    ]
    dashboard, agent = _free_port(), _free_port()
    given = environment(groups(overlay(NAME))["head"])
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "token-of-the-test-" + "0" * 32}
    with subprocess.Popen(
        [sys.executable, "-c", NODES, json.dumps(workers), str(dashboard), str(agent)],
        env=os.environ | given | token | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.startswith("{"))
            yield Nodes(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{agent}", json.loads(line))
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.flush()
            process.communicate(timeout=60)


def _section(folder: Path, port: int) -> dict[str, Any]:
    """serveConfigV2 with the paths and the port of this machine instead of a pod's."""
    (service,) = of_kind(overlay(NAME), "RayService")
    section: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    (config_map,) = of_kind(overlay(NAME), "ConfigMap")
    settings = yaml.safe_load(config_map["data"]["cluster.yaml"])
    settings |= {"port": port, "ledger": {"url": f"sqlite:///{folder}/ledger.db"}}
    for role in ("prefill", "decode"):
        settings[role] |= {"engine": {"threads": 1}}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(settings))
    section["http_options"]["port"] = port
    section["applications"][0]["args"]["config"] = str(folder / "cluster.yaml")
    return section


def _wait_ready(url: str, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{url}/ready", timeout=5)
            if answer.status_code == 200:
                state: dict[str, Any] = answer.json()
                return state
        time.sleep(0.3)
    raise AssertionError(f"not ready after {timeout} s")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_operators_way_leads_to_an_answer(nodes: Nodes, tmp_path: Path) -> None:
    port = _free_port()
    section, applications = _section(tmp_path, port), f"{nodes.dashboard}/api/serve/applications/"
    assert httpx.put(applications, json=section, timeout=60).status_code in (401, 403)
    bearer = {"Authorization": "Bearer token-of-the-test-" + "0" * 32}
    done = httpx.put(applications, json=section, headers=bearer, timeout=60)
    assert done.status_code == 200, done.text
    url = f"http://127.0.0.1:{port}"
    state = _wait_ready(url, 150)
    placed = sorted((info["role"], nodes.groups[info["node"]]) for info in state["workers"])
    assert placed == [("decode", "decode"), ("decode", "decode"), ("prefill", "prefill")]
    assert len({info["node"] for info in state["workers"]}) == 3  # one engine a pod
    for path in ("/health", "/-/healthz"):
        assert httpx.get(f"{url}{path}", timeout=10).status_code == 200
    assert (
        httpx.get(f"{nodes.agent}/api/healthz", timeout=10).status_code == 200
    )  # without the token, as kubelet asks
    key = _check_answer(url, tmp_path)

    # One decode worker less, the way docs/operations.md says: the file first, then another revision.
    settings = yaml.safe_load((tmp_path / "cluster.yaml").read_text())
    settings["decode"]["workers"] = 1
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(settings))
    section["applications"][0]["args"]["revision"] = "another"
    done = httpx.put(applications, json=section, headers=bearer, timeout=60)
    assert done.status_code == 200, done.text
    before = {info["worker"] for info in state["workers"]}
    while len(workers := _wait_ready(url, 120)["workers"]) != 2 or before & {
        info["worker"] for info in workers
    }:
        time.sleep(0.5)
    assert _ask(url, key).status_code == 200


def _ask(url: str, key: str) -> httpx.Response:
    body = {"model": "lightship", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello!"}]}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def _check_answer(url: str, folder: Path) -> str:
    """Makes a key while the service runs, and asks with it."""
    assert _ask(url, "sk-unknown").status_code == 401
    store = KeyStore(f"sqlite:///{folder}/ledger.db")
    try:
        key = store.make("acme")
    finally:
        store.close()
    deadline = time.monotonic() + 30
    while (answer := _ask(url, key)).status_code == 401 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1
    return key
