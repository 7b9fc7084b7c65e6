"""The Serve application: the only place where the deployments are wired together.

`build` gives the application that `cluster.serve` runs; the classes themselves stay undecorated.
"""

from typing import Any, Literal

import msgspec
import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.config import ClusterConfig, DecodeScaling, PrefillScaling, RoleConfig
from cluster.controller import ACTOR_NAME, NAMESPACE, PrefixCacheController
from cluster.gateway import Gateway
from cluster.replica import WorkerReplica
from cluster.scaling import DecodePolicy, PrefillPolicy

APP_NAME = "lightship"
# Ray gives this resource to the head node alone.
ON_HEAD = {"node:__internal_head__": 0.001}
LOOK_BACK_S = 12.0  # over which the figures that decide are averaged; Serve wants more than 10
STOP_S = 10.0  # what a worker that has drained may take to end; then Serve kills it


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
    prefill = _workers("prefill", config).bind("prefill", config, secret)
    decode = _workers("decode", config).bind("decode", config, secret)
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=1_000_000,  # the gateway's own limits count tokens; Serve's would count requests
        ray_actor_options={"num_cpus": config.gateway.num_cpus, "label_selector": config.gateway.labels},
        health_check_period_s=1,
        health_check_timeout_s=5,
    )(serve.ingress()(Gateway))
    return gateway.bind(config, secret, prefill, decode)


def _workers(role: Literal["prefill", "decode"], config: ClusterConfig) -> Any:
    of_role: RoleConfig = getattr(config, role)
    scaling = autoscaling(role, config)
    return serve.deployment(
        name=role,
        **({"autoscaling_config": scaling} if scaling else {"num_replicas": of_role.workers}),
        ray_actor_options={
            "num_cpus": of_role.num_cpus,
            "num_gpus": of_role.num_gpus,
            "label_selector": of_role.labels,
        },
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=of_role.drain_s + STOP_S,
        graceful_shutdown_wait_loop_s=0.1,  # for Serve's own routers to hear of it, but gateways reach workers by themselves
    )(WorkerReplica)


def autoscaling(role: Literal["prefill", "decode"], config: ClusterConfig) -> AutoscalingConfig | None:
    """The policy that Serve asks how many workers there should be; None where their number is fixed."""
    limits: PrefillScaling | DecodeScaling | None = getattr(config.scaling, role)
    if limits is None:
        return None
    of_role: RoleConfig = getattr(config, role)
    return AutoscalingConfig(
        min_replicas=limits.min_workers,
        initial_replicas=of_role.workers,
        max_replicas=limits.max_workers,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=0,  # the policy has delays of its own
        downscale_delay_s=0,
        policy=AutoscalingPolicy(
            policy_function=PrefillPolicy if role == "prefill" else DecodePolicy,
            policy_kwargs=msgspec.structs.asdict(limits),
        ),
    )
