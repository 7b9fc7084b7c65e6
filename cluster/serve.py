"""`python -m cluster.serve`: starts the whole service on this machine and stops it on Ctrl-C.

Everything that can be wrong is looked at before Ray starts: the port, the checkpoint, the memory for one page, the ledger.
"""

import argparse
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import httpx
import msgspec
from rich.console import Console

from cluster.chat_codec import ChatCodec
from cluster.config import ClusterConfig, ConfigError, LedgerConfig, PublicPrefixConfig, load
from cluster.ledger import Ledger, LedgerUnavailable
from cluster.public_prefix import PublicPrefixes
from cluster.tokenizer import Tokenizer
from kernels.layout import num_pages_for
from workers.model import load_model

# Ray Serve reads these at import, in every process. gRPC between replicas: 6.7 -> 1.9 ms for a trivial request (default Serve
# on two cores); an ASGI app on the replica's own loop costs no thread hop per chunk.
FAST_SERVE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",  # default 10: too late for a rush of prompts
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
    "RAY_AUTH_MODE": "disabled",  # one machine, one user; a cluster sets a token
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
READY_TIMEOUT_S = 600.0
DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"


class StartError(Exception):
    """Something a person must put right; the message says what."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    console = Console(stderr=True, highlight=False)
    try:
        config = prepare(arguments, console)
        with Service(config, console) as service:
            service.wait_ready()
            _greet(config, console)
            service.wait_for_signal()
    except (StartError, ConfigError, LedgerUnavailable) as error:
        console.print(f"[red]lightship:[/red] {error}", soft_wrap=True)
        return 1
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.serve", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file; cluster/cluster.yaml documents every setting")
    parser.add_argument(
        "--model", help="a DeepSeek-V3.2 checkpoint in Hugging Face layout; default: the small one in demo/"
    )
    parser.add_argument("--port", type=int, help="default 8000")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, e.g. prefill.workers=2"
    )
    return parser.parse_args(argv)


def prepare(arguments: argparse.Namespace, console: Console) -> ClusterConfig:
    """The configuration, complete and checked. Raises what main() explains."""
    overrides = list(arguments.set)
    if arguments.model:
        overrides.append(f"model={arguments.model}")
    if arguments.port:
        overrides.append(f"port={arguments.port}")
    config = load(arguments.config, overrides)
    _check_port(config.host, config.port)
    model = Path(config.model or DEMO_MODEL).resolve()
    config = resolve_paths(config, model)
    _check_model(config, model)
    Ledger(config.ledger.url).close()
    return config


def resolve_paths(config: ClusterConfig, model: Path) -> ClusterConfig:
    """With absolute paths and the texts of prefixes: actors run in folders of their own. Raises StartError."""
    ledger = LedgerConfig(url=_absolute(config.ledger.url))
    access_log = config.gateway.access_log and str(Path(config.gateway.access_log).resolve())
    gateway = msgspec.structs.replace(config.gateway, access_log=access_log)
    prefixes = list(map(_read_prefix, config.public_prefixes))
    return msgspec.structs.replace(
        config, model=str(model), ledger=ledger, gateway=gateway, public_prefixes=prefixes
    )


def _read_prefix(prefix: PublicPrefixConfig) -> PublicPrefixConfig:
    """With the text of its file: gateways may run where that is not."""
    if prefix.file is None:
        return prefix
    try:
        return PublicPrefixConfig(text=Path(prefix.file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartError(f"public_prefixes: {prefix.file}: {error}") from None


def _absolute(url: str) -> str:
    path = url.removeprefix("sqlite:///")
    return url if path == url else f"sqlite:///{Path(path).resolve()}"


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"cannot listen on {host}:{port}: {error.strerror}. PORT=... chooses another port"
            ) from None


def _check_model(config: ClusterConfig, model: Path) -> None:
    """The checkpoint has every tensor and a known chat format, each worker memory for a page, each public prefix a page."""
    try:
        for role in (config.prefill, config.decode):
            empty = load_model(model, msgspec.structs.replace(role.engine, device="meta"))
            if role.engine.cache_bytes is not None:
                num_pages_for(role.engine.cache_bytes, empty.layout, empty.config.num_hidden_layers)
        tokenizer = Tokenizer(model)
        codec = ChatCodec.load(model, tokenizer, config.chat_encoding)
        PublicPrefixes.load(config.public_prefixes, tokenizer, codec)
    except (ValueError, OSError) as error:
        raise StartError(str(error)) from None


def _cpus(config: ClusterConfig) -> int:
    """At least what the workers ask Ray for: on one machine they share the cores that there are."""
    wanted = config.prefill.num_cpus * config.most_workers("prefill")
    wanted += config.decode.num_cpus * config.most_workers("decode")
    return config.num_cpus or max(math.ceil(wanted), os.cpu_count() or 1)


def _greet(config: ClusterConfig, console: Console) -> None:
    url = f"http://{config.host}:{config.port}"
    console.print(f"[green]ready[/green]: {url}   (Ctrl-C stops everything)\n")
    console.print("try:  make chat" + (f" PORT={config.port}" if config.port != 8000 else "") + "   or:\n")
    body = '{"model": "%s", "stream": true, "max_tokens": 64, "messages": [{"role": "user", "content": "Hello!"}]}'
    sys.stdout.write(
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body % config.served_model_name}'\n\n"
    )
    sys.stdout.flush()


def wait_until_ready(
    config: ClusterConfig, console: Console, stop: threading.Event, timeout_s: float
) -> None:
    """Until a real token has gone through every pair, or `stop`. Raises StartError with Serve's own words when that fails."""
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    url = f"http://{host}:{config.port}/ready"
    deadline = time.monotonic() + timeout_s
    with console.status("loading weights, pairing workers, sending a first token ..."):
        while time.monotonic() < deadline and not stop.is_set():
            try:
                if httpx.get(url, timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            _raise_if_failed()
            time.sleep(0.25)
    if not stop.is_set():
        raise StartError(f"not ready after {timeout_s:.0f} s; Ray's logs are in /tmp/ray/session_latest/logs")


def _raise_if_failed() -> None:
    from ray import serve

    for application in serve.status().applications.values():
        if application.status == "DEPLOY_FAILED":
            details = [d.message for d in application.deployments.values() if d.message] or [
                application.message
            ]
            raise StartError("Serve could not start the workers:\n" + "\n".join(details))


class Service:
    """Ray, the controller and the Serve application, from start to stop."""

    def __init__(self, config: ClusterConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._stop = threading.Event()

    def __enter__(self) -> "Service":
        os.environ.update({key: os.environ.get(key, value) for key, value in FAST_SERVE.items()})
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self._console.print("starting Ray ...")
        import ray  # here, so that it reads the environment set above
        from ray import serve

        from cluster.app import APP_NAME, build, start_controller
        from cluster.controller import NAMESPACE

        config = self._config
        root = str(Path(__file__).resolve().parent.parent)
        ray.init(
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            num_cpus=_cpus(config),
            runtime_env={"env_vars": {"PYTHONPATH": root}},
        )
        self._ray, self._serve = ray, serve
        try:
            secret = secrets.token_hex(32)
            self._controller = start_controller(config, secret)
            serve.start(http_options={"host": config.host, "port": config.port})
            self._console.print(
                f"starting {config.prefill.workers} prefill and {config.decode.workers} decode workers ..."
            )
            serve.run(build(config, secret), name=APP_NAME, route_prefix="/", blocking=False)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._console.print("stopping ...")
        try:
            self._serve.shutdown()
        finally:
            self._ray.shutdown()  # also ends the controller: this driver started the Ray it runs on

    def wait_ready(self) -> None:
        wait_until_ready(self._config, self._console, self._stop, READY_TIMEOUT_S)

    def wait_for_signal(self) -> None:
        self._stop.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()


if __name__ == "__main__":
    sys.exit(main())
