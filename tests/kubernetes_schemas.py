"""Whether Kubernetes and the operators would take an object: the schemas, with unknown fields refused, and KubeRay's own rules.

Kubernetes' schemas are those of version 1.37 in the package kubernetes-validate. No package carries KubeRay's or the Prometheus
operator's: their fields are written down here (KubeRay v1.7.0, ray.io/v1; Prometheus operator 0.80), and the pod templates and
services inside are Kubernetes' own.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource

SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.37.0-local-strict"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
DEFINITIONS = "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s."
STRING, BOOLEAN = {"type": "string"}, {"type": "boolean"}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": STRING}
Object = dict[str, Any]


def _core(name: str) -> Object:
    return {"$ref": f"{DEFINITIONS}api.core.v1.{name}"}


def _closed(required: str, **properties: Object) -> Object:
    """An object of these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: Object) -> Object:
    return {"type": "array", "items": items}


def _custom(kind: str, version: str, spec: Object) -> Object:
    metadata = {"$ref": f"{DEFINITIONS}apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    schema = _closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )
    return {"$schema": DIALECT, "$id": f"https://lightship.invalid/{kind}", **schema}


_GROUP: dict[str, Object] = {
    "rayStartParams": TEXTS,
    "template": _core("PodTemplateSpec"),
    "resources": TEXTS,
    "labels": TEXTS,
}
_HEAD = _closed("template", **_GROUP, headService=_core("Service"), enableIngress=BOOLEAN, serviceType=STRING)
_WORKERS = _closed(
    "groupName minReplicas maxReplicas template",
    **_GROUP,
    groupName=STRING,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    numOfHosts=NUMBER,
    idleTimeoutSeconds=NUMBER,
    priority=NUMBER,
    suspend=BOOLEAN,
    scaleStrategy=_closed("", workersToDelete=_list(STRING)),
)
_AUTOSCALER = _closed(
    "",
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=NUMBER,
    image=STRING,
    imagePullPolicy=STRING,
    resources=_core("ResourceRequirements"),
    securityContext=_core("SecurityContext"),
    env=_list(_core("EnvVar")),
    envFrom=_list(_core("EnvFromSource")),
    volumeMounts=_list(_core("VolumeMount")),
)
_CREDENTIAL = _closed("", value=STRING, valueFrom=_core("EnvVarSource"))
_CLUSTER = _closed(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=_closed(
        "", mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=BOOLEAN
    ),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=_AUTOSCALER,
    gcsFaultToleranceOptions=_closed(
        "",
        backend={"enum": ["redis", "rocksdb"]},
        redisAddress=STRING,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=STRING,
    ),
    headServiceAnnotations=TEXTS,
    headGroupSpec=_HEAD,
    workerGroupSpecs=_list(_WORKERS),
    suspend=BOOLEAN,
    managedBy=STRING,
)
_RAY_SERVICE = _closed(
    "rayClusterConfig",
    rayClusterConfig=_CLUSTER,
    serveConfigV2=STRING,
    serveService=_core("Service"),
    excludeHeadPodFromServeSvc=BOOLEAN,
    rayClusterDeletionDelaySeconds=NUMBER,
    upgradeStrategy=_closed(
        "",
        type=STRING,
        clusterUpgradeOptions=_closed(
            "stepSizePercent intervalSeconds gatewayClassName",
            maxSurgePercent=NUMBER,
            stepSizePercent=NUMBER,
            intervalSeconds=NUMBER,
            gatewayClassName=STRING,
        ),
    ),
    suspend=BOOLEAN,
    managedBy=STRING,
)
_DURATION = {"type": "string", "pattern": "^([0-9]+(ms|[smhdwy]))+$"}
_POD_MONITOR = _closed(
    "selector podMetricsEndpoints",
    selector={"$ref": f"{DEFINITIONS}apimachinery.pkg.apis.meta.v1.LabelSelector"},
    podTargetLabels=_list(STRING),
    jobLabel=STRING,
    namespaceSelector=_closed("", any=BOOLEAN, matchNames=_list(STRING)),
    podMetricsEndpoints=_list(
        _closed(
            "",
            port=STRING,
            path=STRING,
            scheme={"enum": ["http", "https"]},
            interval=_DURATION,
            scrapeTimeout=_DURATION,
            honorLabels=BOOLEAN,
            relabelings=_list({"type": "object"}),
            metricRelabelings=_list({"type": "object"}),
        )
    ),
)
CUSTOM = {
    "RayService": _custom("RayService", "ray.io/v1", _RAY_SERVICE),
    "PodMonitor": _custom("PodMonitor", "monitoring.coreos.com/v1", _POD_MONITOR),
}


@functools.cache
def _registry() -> Registry[Any]:
    definitions = json.loads((SCHEMAS / "_definitions.json").read_text())
    return Registry().with_resource(
        "https://kubernetes.io/api/_definitions.json", Resource.from_contents(definitions)
    )


@functools.cache
def _validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    schema = CUSTOM.get(kind)
    if schema is None:
        group, _, name = version.rpartition("/")
        file = "-".join(part for part in (kind.lower(), group.partition(".")[0], name) if part)
        schema = json.loads((SCHEMAS / f"{file}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=_registry())


def complaints(thing: Object) -> list[str]:
    """What the API server would say of an object, and of a RayService also the operator and Serve."""
    found = [
        f"{error.json_path}: {error.message[:300]}"
        for error in _validator(thing["kind"], thing["apiVersion"]).iter_errors(thing)
    ]
    if not found and thing["kind"] == "RayService":
        found = rule_breaks(thing) + serve_complaints(thing["spec"].get("serveConfigV2", ""))
    return found


def rule_breaks(service: Object) -> list[str]:
    """The operator's own rules, beyond the schema."""
    name, spec = service["metadata"]["name"], service["spec"]
    cluster = spec["rayClusterConfig"]
    upgrade = spec.get("upgradeStrategy", {})
    scales = cluster.get("enableInTreeAutoscaling", False)
    found = []
    if len(name) > 47 or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append("metadata.name: a DNS-1035 label of at most 47 characters")
    if upgrade.get("type", "None") not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
        found.append(f"upgradeStrategy.type: {upgrade['type']}")
    if upgrade.get("type") == "NewClusterWithIncrementalUpgrade" and not (
        scales and "clusterUpgradeOptions" in upgrade
    ):
        found.append("an incremental upgrade needs the autoscaler and clusterUpgradeOptions")
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        found.append("headService.metadata.name must not be set")
    found += _version_breaks(cluster)
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        found += _group_breaks(group, cluster, scales=scales)
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if len(set(names)) < len(names):
        found.append("two worker groups have one name")
    return found


def _version_breaks(cluster: Object) -> list[str]:
    auth = cluster.get("authOptions", {})
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split("."))
    found = []
    if auth.get("mode") == "token" and version < (2, 52):
        found.append("authOptions.mode token needs rayVersion 2.52")
    if auth.get("enableK8sTokenAuth") and version < (2, 55):
        found.append("authOptions.enableK8sTokenAuth needs rayVersion 2.55")
    head = _environment(cluster["headGroupSpec"])
    if "RAY_REDIS_ADDRESS" in head:
        found.append("RAY_REDIS_ADDRESS: use gcsFaultToleranceOptions")
    if "RAY_enable_autoscaler_v2" in head:
        found.append("RAY_enable_autoscaler_v2: use autoscalerOptions.version")
    return found


def _group_breaks(group: Object, cluster: Object, *, scales: bool) -> list[str]:
    name, start = group.get("groupName", "head"), group.get("rayStartParams", {})
    found = []
    if not group["template"]["spec"]["containers"]:
        found.append(f"{name}: no container")
    if "labels" in start:
        found.append(f"{name}: rayStartParams.labels: use labels")
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
        found.append(f"{name}: resources both in rayStartParams and in resources")
    if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
        found.append(f"{name}: minReplicas is more than maxReplicas")
    if "groupName" in group and "replicas" not in group and not scales:
        found.append(f"{name}: without the autoscaler replicas must be set")
    second = scales and cluster.get("autoscalerOptions", {}).get("version", "v2") == "v2"
    if second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
        found.append(f"{name}: restartPolicy must be Never with the second autoscaler")
    return found


def _environment(group: Object) -> set[str]:
    return {entry["name"] for entry in group["template"]["spec"]["containers"][0].get("env", [])}


def serve_complaints(text: str) -> list[str]:
    """What Serve would say of serveConfigV2; and of misspelt keys, about which it says nothing."""
    config = yaml.safe_load(text)
    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValueError as error:
        return [f"serveConfigV2: {error}"]
    return _unknown_keys(config, schema, "serveConfigV2")


def _unknown_keys(given: Object, schema: BaseModel, where: str) -> list[str]:
    found = []
    for key, value in given.items():
        if key not in type(schema).model_fields:
            found.append(f"{where}: unknown key {key}")
            continue
        parsed = getattr(schema, key)
        pairs = [(value, parsed)] if isinstance(parsed, BaseModel) else []
        if isinstance(parsed, list):
            pairs = [(v, p) for v, p in zip(value, parsed, strict=True) if isinstance(p, BaseModel)]
        for inner, model in pairs:
            found += _unknown_keys(inner, model, f"{where}.{key}")
    return found
