"""`ray up`, a chat and `ray down` with cluster/ray/local.yaml, on two addresses of this machine: `python tests/ray_up_locally.py FOLDER`.

It runs itself in namespaces of its own. Process ids: `ray down` stops every Ray that it sees. Network: two addresses on a loopback device,
and port 22 of both for an sshd of its own, with a key of its own. Mounts: /run, /tmp/ray and root's home are its own too. Nothing outside is touched.
Prints what it saw as JSON and fails if that is not what should be. Not a part of the suite: it takes two to four minutes, an sshd and root.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parent.parent
HEAD, WORKER = "10.9.0.1", "10.9.0.2"
API_KEY = "key-of-acme"
NEEDS = ("unshare", "ip", "ssh-keygen", "/usr/sbin/sshd", "rsync")
NAMESPACES = ("unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child")
SSHD = """
ListenAddress {head}:22
ListenAddress {worker}:22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""


def main(folder: Path) -> None:
    """In the outer namespaces: goes into the inner ones."""
    absent = [tool for tool in NEEDS if shutil.which(tool) is None]
    if absent:
        sys.exit(f"needs {', '.join(absent)}: apt-get install openssh-server rsync iproute2")
    inner = [sys.executable, __file__, str(folder), "--inside"]
    sys.exit(subprocess.run([*NAMESPACES, *inner], cwd=ROOT, check=False).returncode)


def inside(folder: Path) -> None:
    home = folder / "home"
    prepare_folder(folder, home)
    # Nothing of the caller's Ray, token or settings.
    environment = {key: os.environ[key] for key in ("LANG", "LC_ALL") if key in os.environ}
    environment |= {
        "HOME": str(home),
        "USER": "root",
        "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
        "RAY_AUTH_MODE": "token",
    }
    with sshd(folder):
        seen = up_chat_down(folder, environment)
    sys.stdout.write(json.dumps(seen) + "\n")
    sys.stdout.flush()
    wanted = {
        "hosts": dict.fromkeys(("prefill", "decode"), WORKER),
        "status": 200,
        "without_key": 401,
        "left": [],
    }
    wrong = {key: seen[key] for key in wanted if seen[key] != wanted[key]}
    sys.exit(f"unexpected: {wrong}" if wrong or not seen["completion_tokens"] else 0)


def prepare_folder(folder: Path, home: Path) -> None:
    (folder / "ray").mkdir(parents=True)
    (home / ".ray").mkdir(parents=True)
    token = home / ".ray" / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    for name in ("host_key", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "local.yaml").write_text(yaml.safe_dump(local_config(folder)))
    settings = {
        "host": "0.0.0.0",
        "prefill": {"engine": {"threads": 1}},
        "decode": {"engine": {"threads": 1}},
        "ledger": {"url": f"sqlite:///{folder}/ledger.db"},
        "tenants": [{"name": "acme", "keys": [hashlib.sha256(API_KEY.encode()).hexdigest()]}],
    }
    (home / "cluster.yaml").write_text(json.dumps(settings))
    run("ip", "link", "set", "lo", "up")
    for address in (HEAD, WORKER):
        run("ip", "address", "add", f"{address}/32", "dev", "lo")
    run("ip", "route", "add", "default", "dev", "lo", "src", HEAD)  # Ray takes its address from the way out
    Path("/tmp/ray").mkdir(exist_ok=True)
    run("mount", "--bind", str(folder / "ray"), "/tmp/ray")
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    # ssh finds the home folder, and so the keys in it, by this file and not by $HOME.
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    (folder / "passwd").write_text("\n".join([f"root:x:0:0:root:{home}:/bin/bash", *others, ""]))
    run("mount", "--bind", str(folder / "passwd"), "/etc/passwd")
    Path("/run/sshd").mkdir()


def local_config(folder: Path) -> dict[str, Any]:
    """The file as it is, but for the addresses and the key, the environment, which is there already, and `ray stop` on the worker,
    which would stop the head on the same machine."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "ray" / "local.yaml").read_text())
    config["provider"] |= {"head_ip": HEAD, "worker_ips": [WORKER]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    make = config["setup_commands"].index("cd ~/lightship && make .venv/.serve")
    config["setup_commands"][make] = f"ln -sfn {sys.prefix} ~/lightship/.venv"
    stop, start = config["worker_start_ray_commands"]
    assert stop == "ray stop"
    config["worker_start_ray_commands"] = [f"{start} --node-ip-address={WORKER}"]
    return config


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[None]:
    (folder / "sshd_config").write_text(SSHD.format(head=HEAD, worker=WORKER, folder=folder))
    with (folder / "sshd.log").open("wb") as log:
        arguments = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def up_chat_down(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What happened, and how many seconds each step took."""
    config = str(folder / "local.yaml")
    seconds: dict[str, float] = {}

    def ray(step: str, command: str, *arguments: str) -> None:
        start = time.monotonic()
        run("ray", command, *arguments, environment=environment)
        seconds[step] = round(time.monotonic() - start, 1)

    ray("up", "up", "-y", "--no-config-cache", config)
    deploy = "cd ~/lightship && python -m cluster.deploy --config ~/cluster.yaml"
    ray("deploy", "exec", config, deploy)
    start = time.monotonic()
    url = f"http://{HEAD}:8000"
    workers = httpx.get(f"{url}/ready", timeout=10).json()["workers"]
    body = {
        "model": "lightship",
        "temperature": 0,
        "max_tokens": 12,
        "messages": [{"role": "user", "content": "What is the expiry of Lunar Koala?"}],
    }
    headers = {"Authorization": f"Bearer {API_KEY}"}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    stranger = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    seconds["chat"] = round(time.monotonic() - start, 1)
    ray("down", "down", "-y", config)
    return {
        "seconds": seconds,
        "hosts": {info["role"]: info["host"] for info in workers},
        "status": reply.status_code,
        "completion_tokens": reply.json().get("usage", {}).get("completion_tokens", 0),
        "without_key": stranger.status_code,
        "left": ray_processes(),
    }


def ray_processes() -> list[str]:
    """Of Ray's own, what is still alive in here. Nobody collects the dead ones, so they are left out."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, state = re.search(r"\((.*)\) (\w)", path.read_text()).groups()  # type: ignore[union-attr]
            if name in ("raylet", "gcs_server") and state != "Z":
                alive.append(name)
    return alive


def run(*command: str, environment: dict[str, str] | None = None) -> None:
    """Says on stderr what the command said, if it fails."""
    done = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")


if __name__ == "__main__":
    (inside if "--inside" in sys.argv else main)(Path(sys.argv[1]))
