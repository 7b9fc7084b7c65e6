"""`python -m cluster.deploy`: puts the service on a Ray cluster that is already up, and leaves it there.

For clusters made by `ray up`, or by `ray start` on each machine; to be called on the head. Deploying again with other settings replaces
what has changed. Where there is no Ray yet, on one machine, `cluster.serve` is for you.
"""

import argparse
import os
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.chat_codec import ChatCodec
from cluster.config import ClusterConfig, ConfigError, is_loopback, load
from cluster.ledger import Ledger, LedgerUnavailable
from cluster.serve import DEMO_MODEL, FAST_SERVE, READY_TIMEOUT_S, StartError, resolve_paths, wait_until_ready
from cluster.tokenizer import Tokenizer
from workers.model_config import ModelConfig

STOP_TIMEOUT_S = 60.0


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    console = Console(stderr=True, highlight=False)
    # A driver's part of what every `ray start` of the cluster has in its environment; how Ray authenticates is the cluster's affair.
    os.environ.update({k: os.environ.get(k, v) for k, v in FAST_SERVE.items() if k != "RAY_AUTH_MODE"})
    try:
        if arguments.stop:
            stop(console)
        else:
            deploy(prepare(arguments), console)
    except (StartError, ConfigError, LedgerUnavailable) as error:
        console.print(f"[red]lightship:[/red] {error}", soft_wrap=True)
        return 1
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.deploy", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file; cluster/cluster.yaml documents every setting")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, e.g. decode.workers=2"
    )
    parser.add_argument("--stop", action="store_true", help="take the service down and leave Ray as it is")
    return parser.parse_args(argv)


def prepare(arguments: argparse.Namespace) -> ClusterConfig:
    """The configuration, complete. The head may have no weights: of the model's folder only what the gateway reads is looked at."""
    config = load(arguments.config, arguments.set)
    model = Path(config.model or DEMO_MODEL).resolve()
    try:
        ModelConfig.load(model)
        ChatCodec.load(model, Tokenizer(model), config.chat_encoding)
    except (ValueError, OSError) as error:
        raise StartError(str(error)) from None
    config = resolve_paths(config, model)
    Ledger(config.ledger.url).close()
    return config


def deploy(config: ClusterConfig, console: Console) -> None:
    """Returns when a real token has gone through every pair, however long the cloud takes for machines. Raises StartError."""
    ray = _join()
    from ray import serve

    from cluster.app import APP_NAME, build, start_controller

    _check_reachable(config, {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    # A controller that runs already keeps its secret, or its workers would be strangers to it.
    controller = start_controller(config, secrets.token_hex(32))
    secret: str = ray.get(controller.secret.remote())
    serve.start(http_options={"host": config.host, "port": config.port})
    console.print(
        f"deploying {config.prefill.workers} prefill and {config.decode.workers} decode workers ..."
    )
    try:
        serve.run(build(config, secret), name=APP_NAME, route_prefix="/", blocking=False)
    except RuntimeError as error:  # in Serve's own words
        raise StartError(str(error)) from None
    wait_until_ready(config, console, threading.Event(), READY_TIMEOUT_S)
    console.print(f"[green]ready[/green]: http://{config.host}:{config.port}")


def stop(console: Console) -> None:
    """Takes the application and the controller down. What the ledger holds stays."""
    ray = _join()
    from ray import serve

    from cluster.controller import ACTOR_NAME, NAMESPACE

    serve.shutdown()
    try:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=NAMESPACE))
    except ValueError:
        console.print("nothing was running")
        return
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _is_there(ray, ACTOR_NAME, NAMESPACE):
        if time.monotonic() > deadline:
            raise StartError(f"the controller has not ended within {STOP_TIMEOUT_S:.0f} s")
        time.sleep(0.1)
    console.print("stopped")


def _join() -> Any:
    """Ray's module, with this process in the cluster that runs on this machine."""
    import ray  # here, so that it reads the environment set above

    from cluster.controller import NAMESPACE

    root = str(Path(__file__).resolve().parent.parent)
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            namespace=NAMESPACE,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": root}},  # the same path on every machine
        )
    except ConnectionError as error:
        raise StartError(f"no Ray cluster runs on this machine: {error}") from None
    return ray


def _check_reachable(config: ClusterConfig, addresses: set[str]) -> None:
    """With several machines, workers have to hear each other: a loopback host would keep each to its own."""
    if is_loopback(config.host) and len(addresses) > 1:
        raise StartError(
            f"host is {config.host}, but this Ray cluster has {len(addresses)} machines: set host to 0.0.0.0, with tenants or keys_required"
        )


def _is_there(ray: Any, name: str, namespace: str) -> bool:
    try:
        ray.get_actor(name, namespace=namespace)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
