"""The commands of docs/operations.md with the real kubectl, dry, against an API server that knows the schemas."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes_api_server import ApiServer
from kubernetes_objects import K8S, KUBECTL, OVERLAYS, overlay


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as api:
        yield api


def kubectl(server: ApiServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KUBECTL, f"--server={server.url}", "--kubeconfig=/dev/null", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_applies_an_overlay(server: ApiServer, name: str) -> None:
    done = kubectl(server, "apply", "--server-side", "--dry-run=server", "-k", str(K8S / "overlays" / name))
    assert done.returncode == 0, done.stderr
    assert sorted(server.seen) == sorted(f"{t['kind']}/{t['metadata']['name']}" for t in overlay(name))
    assert len(done.stdout.splitlines()) == len(overlay(name))


def test_kubectl_creates_what_was_not_there(server: ApiServer) -> None:
    done = kubectl(server, "apply", "--dry-run=client", "-k", str(K8S / "overlays" / "cpu-demo"))
    assert done.returncode == 0, done.stderr
    assert "rayservice.ray.io/lightship created (dry run)" in done.stdout
    done = kubectl(server, "create", "--dry-run=server", "-k", str(K8S / "overlays" / "cpu-demo"))
    assert done.returncode == 0, done.stderr
    assert "RayService/lightship" in server.seen


@pytest.mark.parametrize("file", sorted((K8S / "examples").iterdir()), ids=lambda file: file.name)
def test_kubectl_applies_an_example(server: ApiServer, file: Path) -> None:
    done = kubectl(server, "apply", "--server-side", "--dry-run=server", "-f", str(file))
    assert done.returncode == 0, done.stderr
    assert len(server.seen) == 1


def test_kubectl_shows_what_is_wrong(server: ApiServer, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "base" / "rayservice.yaml"
    file.write_text(file.read_text().replace("mode: token", "modus: token"))
    done = kubectl(
        server, "create", "--dry-run=server", "-k", str(tmp_path / "k8s" / "overlays" / "cpu-demo")
    )
    assert done.returncode == 1
    assert "modus" in done.stderr
    assert "RayService/lightship" not in server.seen
