"""The Serve application: the only place where the deployments are wired together.

`build` gives the application that `cluster.serve` runs; the classes themselves stay undecorated.
"""

from typing import Any, Literal

import ray
from ray import serve
from ray.serve import Application

from cluster.config import ClusterConfig, RoleConfig
from cluster.controller import ACTOR_NAME, NAMESPACE, PrefixCacheController
from cluster.gateway import Gateway
from cluster.replica import WorkerReplica

APP_NAME = "lightship"
# Ray gives this resource to the head node alone.
ON_HEAD = {"node:__internal_head__": 0.001}


def start_controller(config: ClusterConfig, secret: str) -> Any:
    """The prefix-cache controller: one named detached actor that Ray restarts for ever, where the ledger's file is: on the head.

    One that runs already stays, with the secret it was made with.
    """
    return (
        ray.remote(PrefixCacheController)
        .options(
            name=ACTOR_NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=1000,
            num_cpus=0,
            resources=ON_HEAD,
        )
        .remote(config.ledger.url, secret)
    )


def build(config: ClusterConfig, secret: str) -> Application:
    """The application graph: a gateway in front of prefill and decode workers."""
    prefill = _workers("prefill", config.prefill).bind("prefill", config, secret)
    decode = _workers("decode", config.decode).bind("decode", config, secret)
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=1_000_000,  # the gateway's own limits count tokens; Serve's would count requests
        ray_actor_options={"num_cpus": config.gateway.num_cpus, "label_selector": config.gateway.labels},
        health_check_period_s=1,
        health_check_timeout_s=5,
    )(serve.ingress()(Gateway))
    return gateway.bind(config, secret, prefill, decode)


def _workers(role: Literal["prefill", "decode"], config: RoleConfig) -> Any:
    return serve.deployment(
        name=role,
        num_replicas=config.workers,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "label_selector": config.labels,
        },
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=5,
    )(WorkerReplica)
