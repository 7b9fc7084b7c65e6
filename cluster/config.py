"""The cluster's settings: one YAML file, strictly read. Knows nothing of what is running.

`cluster.yaml` beside this file lists every setting with its default. What one engine may use is `workers.config`.
"""

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from cluster.chat_encoding import ChatFormat, Message
from cluster.limits import TenantLimits
from workers.config import EngineConfig

AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
HttpUrl = Annotated[str, msgspec.Meta(pattern="^https?://[^/]+")]
Name = Annotated[str, msgspec.Meta(min_length=1)]
KeyHash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # sha256 of an API key, in hex


class ConfigError(ValueError):
    """A setting is wrong. The sentence names the file and the key."""


class RoleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The workers of one role. Every worker is alike."""

    workers: AtLeastOne = 1
    num_cpus: NotNegative = 1.0  # what Ray sets aside for one worker
    num_gpus: NotNegative = 0.0
    labels: dict[Name, Name] = {}  # of the Ray nodes that its workers may run on; none: of any
    drain_s: NotNegative = 60.0  # what a worker that is to go may take for the requests that it has
    engine: EngineConfig = EngineConfig()


class PrefillScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """By which prefill workers come and go; see `cluster.scaling`."""

    min_workers: AtLeastOne = 1
    max_workers: AtLeastOne
    wait_goal_s: Positive = 1.0  # within which all prompt tokens that wait are to be computed
    busy_goal: Share = 0.8  # of the time, spent in steps
    lower_after_s: NotNegative = 300.0  # for how long fewer must have been enough before one goes


class DecodeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """By which decode workers come and go."""

    min_workers: AtLeastOne = 1
    max_workers: AtLeastOne
    share_goal: Share = 0.8  # of the pages that requests hold, and of max_running
    step_goal_s: Positive | None = None  # of a step, which is a token of each request; None: does not matter
    lower_after_s: NotNegative = 300.0


class ScalingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """None: as many workers as the role's `workers` says."""

    prefill: PrefillScaling | None = None
    decode: DecodeScaling | None = None


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of one gateway replica. Beyond them it answers 429 or 503 (413 for a body)."""

    replicas: AtLeastOne = 1
    num_cpus: NotNegative = 0.0  # what Ray sets aside for one gateway
    labels: dict[Name, Name] = {}  # of the Ray nodes that gateways may run on; none: of any
    max_body_bytes: AtLeastOne = 4 * 2**20
    max_concurrency: AtLeastOne = 256  # requests in progress
    max_queued_tokens: AtLeastOne = 2**20  # prompt tokens whose first token has not come yet
    request_timeout_s: Positive = 600.0  # of a request that names none in x-request-timeout
    max_request_timeout_s: Positive = 3600.0  # that one may name
    worker_timeout_s: Positive = 3.0  # a worker whose frames stop for so long is taken for dead
    access_log: Name | None = None  # a file of JSON lines; None: the gateway's stdout
    traces: HttpUrl | None = None  # an OpenTelemetry collector's OTLP/HTTP endpoint; None: no traces


class TenantConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whoever shares a prefix cache and a bill."""

    name: Name
    keys: Annotated[list[KeyHash], msgspec.Meta(min_length=1)]
    limits: TenantLimits = TenantLimits()  # those set with `cluster.keys` go before


class PublicPrefixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The beginning of prompts whose cached pages all tenants share: exactly one of the four."""

    file: Name | None = None  # UTF-8: read when the service starts, and then its text
    text: Name | None = None  # of a raw prompt, or of a chat's system message
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)] | None = None  # as in a chat
    tokens: Annotated[list[int], msgspec.Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in self.__struct_fields__) != 1:
            raise ValueError("exactly one of file, text, messages and tokens must be set")


class LedgerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    url: Name = "sqlite:///var/ledger.db"  # a SQLAlchemy URL


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything one cluster is started with. Raises ValueError where settings contradict each other."""

    model: str | None = None  # folder of a checkpoint; None: the small one in demo/
    served_model_name: Name = "lightship"
    chat_encoding: ChatFormat | None = None  # None: by what is in the checkpoint
    host: Name = "127.0.0.1"
    port: Port = 8000
    prefill: RoleConfig = RoleConfig()
    decode: RoleConfig = RoleConfig()
    scaling: ScalingConfig = ScalingConfig()
    gateway: GatewayConfig = GatewayConfig()
    tenants: list[TenantConfig] = []
    keys_required: bool = False  # false: while no key was ever made, every caller is tenant "default"
    public_prefixes: list[PublicPrefixConfig] = []
    ledger: LedgerConfig = LedgerConfig()
    price_entry: Name = "v3.2-exp-launch"  # of the price book
    num_cpus: AtLeastOne | None = None  # what Ray may count on where it is started on this machine; None: all

    def __post_init__(self) -> None:
        if self.gateway.request_timeout_s > self.gateway.max_request_timeout_s:
            raise ValueError(
                f"gateway.request_timeout_s is {self.gateway.request_timeout_s:g}, more than "
                f"gateway.max_request_timeout_s, which is {self.gateway.max_request_timeout_s:g}"
            )
        _check_tenants(self.tenants)
        if not self.tenants and not self.keys_required and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} is not a loopback address and tenants is empty: anyone who can reach it could use "
                "the service; set keys_required, configure tenants with keys, or set host to 127.0.0.1"
            )
        for key in ("precision", "max_context"):
            mine, theirs = getattr(self.prefill.engine, key), getattr(self.decode.engine, key)
            if mine != theirs:
                raise ValueError(
                    f"prefill.engine.{key} is {mine} but decode.engine.{key} is {theirs}: they must agree"
                )
        for role in ("prefill", "decode"):
            config: RoleConfig = getattr(self, role)
            if config.engine.device.startswith("cuda") and config.num_gpus < config.engine.ranks:
                raise ValueError(
                    f"{role}.engine.device is {config.engine.device} and {role}.engine.ranks {config.engine.ranks}, "
                    f"but {role}.num_gpus is {config.num_gpus:g}: a rank needs a GPU"
                )
            scaling: PrefillScaling | DecodeScaling | None = getattr(self.scaling, role)
            if scaling and not scaling.min_workers <= config.workers <= scaling.max_workers:
                raise ValueError(
                    f"{role}.workers is {config.workers}, which is to start with, but scaling.{role} allows "
                    f"{scaling.min_workers} to {scaling.max_workers}"
                )

    def most_workers(self, role: Literal["prefill", "decode"]) -> int:
        """How many there may be at once."""
        scaling: PrefillScaling | DecodeScaling | None = getattr(self.scaling, role)
        of_role: RoleConfig = getattr(self, role)
        return scaling.max_workers if scaling else of_role.workers


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Reads a YAML file (None: the defaults) and lays `overrides` over it, each "dotted.key=value" with a YAML value.

    Raises ConfigError for an unreadable file, an unknown key, a wrong value and a contradiction.
    """
    source = "the default settings" if path is None else str(path)
    if overrides:
        source += f" with {' '.join(overrides)}"
    settings = {} if path is None else _read(Path(path))
    for override in overrides:
        _override(settings, override)
    try:
        return msgspec.convert(settings, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_name_key(str(error))}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = msgspec.yaml.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected settings by name, got a {type(settings).__name__}")
    return settings


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"{override!r} is not of the form dotted.key=value")
    for parent in parents:
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            raise ConfigError(f"{override!r}: {parent} is not a group of settings")
    try:
        settings[last] = msgspec.yaml.decode(value.encode())
    except msgspec.DecodeError as error:
        raise ConfigError(f"{override!r}: {error}") from error


def _check_tenants(tenants: list[TenantConfig]) -> None:
    names: set[str] = set()
    owners: dict[str, str] = {}
    for tenant in tenants:
        if tenant.name in names:
            raise ValueError(f"tenants: the name {tenant.name!r} is there twice")
        names.add(tenant.name)
        for key in tenant.keys:
            if key in owners:
                raise ValueError(f"tenants: a key of {tenant.name!r} is already a key of {owners[key]!r}")
            owners[key] = tenant.name


def _name_key(message: str) -> str:
    """msgspec's sentence with the key in front: "prefill.workers: Expected `int` >= 1"."""
    sentence, _, where = message.partition(" - at ")
    key = re.sub(r"^\$\.?", "", where.strip("`"))
    return f"{key}: {sentence}" if key else sentence
