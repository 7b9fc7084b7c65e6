"""The Serve application as KubeRay asks for it: an import path, `cluster.kuberay:application`, and the name of a file.

What it builds is what `cluster.serve` runs, from the same file of settings. Knows nothing of Kubernetes' objects, which are in k8s/.
"""

import secrets
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.serve import Application

from cluster.app import build, start_controller
from cluster.config import ClusterConfig, is_loopback, load
from cluster.serve import DEMO_MODEL, resolve_paths
from workers.model_config import ModelConfig


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`args` of the application in a Serve config file."""

    config: str  # the file of settings; cluster/cluster.yaml documents every one
    revision: str = ""  # anything: a new value makes Serve read the file again and replace what has changed


def application(arguments: dict[str, Any]) -> Application:
    """Called by Serve, in a task on any node, whenever `args` change. The controller keeps its secret from one call to the next.

    Raises ConfigError for wrong settings and ValueError for a model's folder without a readable config.json.
    """
    config = read_settings(msgspec.convert(arguments, Arguments).config)
    controller = start_controller(config, secrets.token_hex(32))
    secret: str = ray.get(controller.secret.remote())
    return build(config, secret)


def read_settings(path: str) -> ClusterConfig:
    """The file's settings, for pods: each has an address of its own, so that workers listening on loopback would not be found."""
    config = load(path)
    if is_loopback(config.host):
        raise ValueError(f"{path}: host is {config.host}, which other pods cannot reach; set it to 0.0.0.0")
    model = Path(config.model or DEMO_MODEL).resolve()
    ModelConfig.load(model)
    return resolve_paths(config, model)
