"""The service on a Ray cluster of three nodes: the head without workers, one node for prefill and one for decode."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster import deploy
from cluster.config import ClusterConfig, TenantConfig
from cluster.serve import FAST_SERVE, StartError

ROOT = Path(__file__).resolve().parent.parent
LABEL = "lightship-role"
# Starts the nodes, prints {role: node id} and Ray's address, and waits for the end of its input.
NODES = f"""
import json, ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False}})
nodes = {{role: cluster.add_node(num_cpus=1, labels={{"{LABEL}": role}}).node_id for role in ("prefill", "decode")}}
print(json.dumps({{"address": cluster.address, "nodes": nodes}}), flush=True)
input()
cluster.shutdown()
"""


def test_a_loopback_host_is_for_one_machine() -> None:
    keys = ["0" * 64]
    loopback = ClusterConfig()
    deploy._check_reachable(loopback, {"10.0.0.1"})
    with pytest.raises(StartError, match="2 machines"):
        deploy._check_reachable(loopback, {"10.0.0.1", "10.0.0.2"})
    reachable = ClusterConfig(host="0.0.0.0", tenants=[TenantConfig(name="acme", keys=keys)])
    deploy._check_reachable(reachable, {"10.0.0.1", "10.0.0.2"})


def test_a_wrong_model_is_refused_before_ray(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert deploy.main(["--set", f"model={tmp_path}"]) == 1
    assert "config.json" in capsys.readouterr().err


@dataclass
class Nodes:
    address: str
    by_role: dict[str, str]  # role -> node id
    environment: dict[str, str]

    def deploy(self, *arguments: str) -> str:
        """Runs the command as an operator on the head does; what it said."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster.deploy", *arguments],
            cwd=ROOT,
            env=self.environment | {"RAY_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Ray gives a node 30 s to start, which busy cores can exceed.
    environment = os.environ | FAST_SERVE | {"RAY_raylet_start_wait_time_s": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", NODES],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.startswith("{"))
            made = json.loads(line)
            yield Nodes(made["address"], made["nodes"], environment)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.flush()
            process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.ray
def test_prefill_and_decode_answer_from_nodes_of_their_own(nodes: Nodes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {
        "port": port,
        "prefill": {"labels": {LABEL: "prefill"}, "engine": {"threads": 1}},
        "decode": {"labels": {LABEL: "decode"}, "engine": {"threads": 1}},
        "ledger": {"url": f"sqlite:///{tmp_path}/ledger.db"},
    }
    (tmp_path / "cluster.yaml").write_text(json.dumps(settings))
    assert "ready" in nodes.deploy("--config", str(tmp_path / "cluster.yaml"))
    workers = httpx.get(f"{url}/ready", timeout=10).json()["workers"]
    assert {info["role"]: info["node"] for info in workers} == nodes.by_role
    assert nodes.by_role["prefill"] != nodes.by_role["decode"]
    body = {
        "model": "lightship",
        "temperature": 0,
        "max_tokens": 12,
        "messages": [{"role": "user", "content": "What is the expiry of Lunar Koala?"}],
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1
    assert "stopped" in nodes.deploy("--stop")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/health", timeout=5)
