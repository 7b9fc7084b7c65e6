"""The overlays of k8s/ as kubectl renders them: valid for Kubernetes, KubeRay and Serve, closed, and in step with their cluster.yaml."""

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import yaml
from kubernetes_objects import (
    K8S,
    OVERLAYS,
    ROOT,
    Object,
    Peer,
    allowed,
    container,
    environment,
    groups,
    of_kind,
    overlay,
    pod_labels,
    ray_cluster,
    render,
)
from kubernetes_schemas import complaints
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema

from cluster import kuberay
from cluster.app import APP_NAME
from cluster.config import ClusterConfig, is_loopback, load
from cluster.serve import FAST_SERVE

every_overlay = pytest.mark.parametrize("name", OVERLAYS)
NAMESPACE = "lightship"


def ray_service(name: str) -> Object:
    (service,) = of_kind(overlay(name), "RayService")
    return service


def serve_config(name: str) -> Object:
    config: Object = yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"])
    return config


def settings(name: str) -> ClusterConfig:
    return load(K8S / "overlays" / name / "cluster.yaml")


# --- Valid


@every_overlay
def test_every_object_is_valid(name: str) -> None:
    for thing in overlay(name):
        assert not complaints(thing), (thing["kind"], thing["metadata"]["name"])
        assert thing["kind"] == "Namespace" or thing["metadata"]["namespace"] == NAMESPACE


@pytest.mark.parametrize("file", sorted((K8S / "examples").iterdir()), ids=lambda file: file.name)
def test_every_example_is_valid(file: Path) -> None:
    for thing in yaml.safe_load_all(file.read_text()):
        assert not complaints(thing)
        assert thing["metadata"]["namespace"] == NAMESPACE


def _pod(service: Object) -> Object:
    template: Object = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]
    return template


MISTAKES: dict[str, tuple[Callable[[Object], object], str]] = {
    "misspelt in the service": (lambda s: s["spec"].update(serveConfig=""), "serveConfig"),
    "misspelt in the cluster": (lambda s: s["spec"]["rayClusterConfig"].update(rayversion="2"), "rayversion"),
    "misspelt in a container": (lambda s: _pod(s)["containers"][0].update(volumemounts=[]), "volumemounts"),
    "misspelt in a port": (lambda s: _pod(s)["containers"][0]["ports"][0].update(hostport=1), "hostport"),
    "a number in the environment": (
        lambda s: _pod(s)["containers"][0]["env"][0].update(value=1),
        "not of type",
    ),
    "no maxReplicas": (
        lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop("maxReplicas"),
        "maxReplicas",
    ),
    "min over max": (
        lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas=9),
        "minReplicas",
    ),
    "no replicas": (
        lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop("replicas"),
        "replicas must",
    ),
    "two groups of one name": (
        lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(groupName="decode"),
        "one name",
    ),
    "unknown upgrade": (lambda s: s["spec"]["upgradeStrategy"].update(type="none"), "upgradeStrategy.type"),
    "incremental upgrade": (
        lambda s: s["spec"]["upgradeStrategy"].update(type="NewClusterWithIncrementalUpgrade"),
        "incremental",
    ),
    "long name": (lambda s: s["metadata"].update(name="l" * 48), "47 characters"),
    "name with a dot": (lambda s: s["metadata"].update(name="light.ship"), "DNS-1035"),
    "token for an old Ray": (lambda s: s["spec"]["rayClusterConfig"].update(rayVersion="2.51.0"), "2.52"),
    "labels in the start parameters": (
        lambda s: s["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update(labels="a=b"),
        "use labels",
    ),
    "resources twice": (
        lambda s: s["spec"]["rayClusterConfig"]["headGroupSpec"].update(resources={"CPU": "1"}),
        "resources both",
    ),
    "Redis by the back door": (
        lambda s: container(s["spec"]["rayClusterConfig"]["headGroupSpec"])["env"].append(
            {"name": "RAY_REDIS_ADDRESS", "value": "redis"}
        ),
        "RAY_REDIS_ADDRESS",
    ),
    "misspelt for Serve": (
        lambda s: s["spec"].update(serveConfigV2=s["spec"]["serveConfigV2"].replace("route_prefix", "route")),
        "unknown key route",
    ),
    "import path of no module": (
        lambda s: s["spec"].update(
            serveConfigV2=s["spec"]["serveConfigV2"].replace("cluster.kuberay:application", "kuberay")
        ),
        "import path",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    service = copy.deepcopy(ray_service("cpu-demo"))
    make, word = MISTAKES[mistake]
    make(service)
    assert any(word in complaint for complaint in complaints(service)), complaints(service)


# --- In step with what `make serve` runs


@every_overlay
def test_serve_gets_what_make_serve_starts(name: str) -> None:
    config, file = settings(name), serve_config(name)
    deploy = ServeDeploySchema.model_validate(file)
    (application,) = deploy.applications
    assert deploy.http_options == HTTPOptionsSchema(host=config.host, port=config.port)
    assert (application.name, application.route_prefix) == (APP_NAME, "/")
    module, _, attribute = str(application.import_path).partition(":")
    assert (module, getattr(kuberay, attribute)) == (kuberay.__name__, kuberay.application)
    assert not application.deployments  # all are made by cluster.app
    assert set(application.args) <= set(kuberay.Arguments.__struct_fields__)


@every_overlay
def test_serve_has_the_settings_of_make_serve(name: str) -> None:
    wanted = {
        key: value for key, value in FAST_SERVE.items() if key != "RAY_AUTH_MODE"
    }  # authOptions says that
    assert ray_cluster(overlay(name))["authOptions"] == {"mode": "token"}
    for group in groups(overlay(name)).values():
        given = environment(group)
        assert {key: given.get(key) for key in wanted} == wanted
        assert "RAY_AUTH_MODE" not in given


@every_overlay
def test_the_settings_are_the_file_that_the_application_reads(name: str) -> None:
    (config_map,) = of_kind(overlay(name), "ConfigMap")
    assert config_map["data"] == {
        "cluster.yaml": (K8S / "overlays" / name / "cluster.yaml").read_text(encoding="utf-8")
    }
    (application,) = serve_config(name)["applications"]
    for group in groups(overlay(name)).values():
        mounted = {mount["name"]: mount["mountPath"] for mount in container(group)["volumeMounts"]}
        assert f"{mounted['config']}/cluster.yaml" == application["args"]["config"]
    assert {"name": "config", "configMap": {"name": config_map["metadata"]["name"]}} in (
        groups(overlay(name))["decode"]["template"]["spec"]["volumes"]
    )


@every_overlay
def test_ray_is_of_the_version_that_is_installed(name: str) -> None:
    assert ray_cluster(overlay(name))["rayVersion"] == ray.__version__
    assert f"ray[serve]=={ray.__version__}\n" in (ROOT / "requirements.txt").read_text()


@every_overlay
def test_each_pod_of_a_role_is_one_engine(name: str) -> None:
    config, by_name = settings(name), groups(overlay(name))
    for role in ("prefill", "decode"):
        wanted, group = getattr(config, role), by_name[role]
        limits = container(group)["resources"]["limits"]
        assert {group[key] for key in ("replicas", "minReplicas", "maxReplicas")} == {wanted.workers}
        assert group.get("numOfHosts", 1) == 1  # the ranks of a worker are processes of one machine
        assert wanted.labels == group["labels"]
        assert float(limits["cpu"]) == wanted.num_cpus
        assert float(limits.get("nvidia.com/gpu", "0")) == wanted.num_gpus
        assert wanted.engine.device == ("cuda" if wanted.num_gpus else "cpu")
        assert wanted.engine.ranks == max(wanted.num_gpus, 1)
    gateway = by_name["gateway"]
    assert gateway["replicas"] == config.gateway.replicas
    assert config.gateway.labels == gateway["labels"]
    assert float(container(gateway)["resources"]["limits"]["cpu"]) == config.gateway.num_cpus
    assert len({str(group["labels"]) for group in by_name.values() if "labels" in group}) == 3


@every_overlay
def test_what_is_written_lies_on_a_volume(name: str) -> None:
    config = settings(name)
    mounted = {mount["mountPath"] for mount in container(groups(overlay(name))["head"])["volumeMounts"]}
    assert str(Path(config.ledger.url.removeprefix("sqlite:///")).parent) in mounted
    assert config.model is None or any(config.model.startswith(f"{path}/") for path in mounted)


@every_overlay
def test_nobody_is_let_in_without_a_key(name: str) -> None:
    assert settings(name).keys_required
    assert not is_loopback(settings(name).host)


# --- Closed


@every_overlay
def test_pods_have_no_rights_and_cannot_write_their_image(name: str) -> None:
    (account,) = of_kind(overlay(name), "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert not {"Secret", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"} & {
        thing["kind"] for thing in overlay(name)
    }
    (namespace,) = of_kind(overlay(name), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for group in groups(overlay(name)).values():
        pod, only = group["template"]["spec"], container(group)
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert {kind for volume in pod["volumes"] for kind in volume if kind != "name"} <= {
            "configMap",
            "emptyDir",
            "persistentVolumeClaim",
        }
        writable = {mount["mountPath"] for mount in only["volumeMounts"] if not mount.get("readOnly")}
        assert writable - {"/var/lib/lightship"} == {"/dev/shm", "/tmp", "/home/lightship"}


@every_overlay
def test_requests_are_limits_and_shared_memory_is_memory(name: str) -> None:
    for group in groups(overlay(name)).values():
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        shared = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == "shared-memory")
        assert shared["emptyDir"]["medium"] == "Memory"
        gibibytes = int(re.fullmatch(r"(\d+)Gi", shared["emptyDir"]["sizeLimit"]).group(1))  # type: ignore[union-attr]
        assert int(group["rayStartParams"]["object-store-memory"]) < gibibytes * 2**30


@every_overlay
def test_only_gateways_are_reachable(name: str) -> None:
    objects = overlay(name)
    pods = {role: Peer(NAMESPACE, pod_labels(group)) for role, group in groups(objects).items()}
    outside, neighbour = Peer(), Peer("default", {"app": "other"})
    for role, pod in pods.items():
        for stranger in (outside, neighbour, Peer(NAMESPACE, {"app": "other"})):
            for port in (6379, 8000, 8265, 10001, 30000, 52365):  # Ray's, and those of workers anywhere
                assert allowed(objects, stranger, pod, port) == (role == "gateway" and port == 8000)
        assert not allowed(objects, pod, outside, 443)
        assert not allowed(objects, pod, neighbour, 5432)
        assert allowed(objects, pod, Peer("kube-system", {"k8s-app": "kube-dns"}), 53)
        assert all(allowed(objects, pod, other, 40000) for other in pods.values())
    operator = Peer("kuberay", {"app.kubernetes.io/name": "kuberay-operator"})
    assert allowed(objects, operator, pods["head"], 8265)
    assert not allowed(objects, operator, pods["head"], 6379)
    prometheus = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"})
    monitored = bool(of_kind(objects, "PodMonitor"))
    assert all(allowed(objects, prometheus, pod, 8080) == monitored for pod in pods.values())


# --- Service, budgets, monitors, probes


@every_overlay
def test_the_service_leads_to_gateways(name: str) -> None:
    (service,) = of_kind(overlay(name), "Service")
    found = [
        role
        for role, group in groups(overlay(name)).items()
        if service["spec"]["selector"].items() <= pod_labels(group).items()
    ]
    assert found == ["gateway"]
    (port,) = service["spec"]["ports"]
    ports = {p["name"]: p["containerPort"] for p in container(groups(overlay(name))["gateway"])["ports"]}
    assert ports[port["targetPort"]] == settings(name).port
    (ingress,) = yaml.safe_load_all((K8S / "examples" / "ingress.yaml").read_text())
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"] == {
        "name": service["metadata"]["name"],
        "port": {"name": port["name"]},
    }


@every_overlay
def test_a_budget_never_asks_for_more_pods_than_there_are(name: str) -> None:
    by_name = groups(overlay(name))
    guarded = []
    for budget in of_kind(overlay(name), "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        (role,) = [r for r, group in by_name.items() if selector.items() <= pod_labels(group).items()]
        guarded.append(role)
        assert set(budget["spec"]) == {
            "minAvailable",
            "selector",
        }  # maxUnavailable needs an owner with a scale
        assert 1 <= budget["spec"]["minAvailable"] <= by_name[role].get("replicas", 1)
    assert sorted(guarded) == sorted(by_name)


@every_overlay
def test_monitors_find_their_ports(name: str) -> None:
    for monitor in of_kind(overlay(name), "PodMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        chosen = [g for g in groups(overlay(name)).values() if selector.items() <= pod_labels(g).items()]
        assert chosen
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert all(endpoint["port"] in {p["name"] for p in container(g)["ports"]} for g in chosen)


@every_overlay
def test_gateways_start_with_a_real_token_and_stay_while_workers_come(name: str) -> None:
    by_name = groups(overlay(name))
    gateway = container(by_name["gateway"])
    start = gateway["startupProbe"]
    assert start["httpGet"] == {"path": "/ready", "port": "serve"}
    assert start["periodSeconds"] * start["failureThreshold"] >= 3600  # weights of the full model
    assert gateway["readinessProbe"]["httpGet"] == {"path": "/health", "port": "serve"}
    for group in by_name.values():
        only = container(group)
        assert only["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert "readinessProbe" in only
    pause = gateway["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert by_name["gateway"]["template"]["spec"]["terminationGracePeriodSeconds"] > pause


# --- Components


def test_the_ledger_can_be_in_postgresql(tmp_path: Path) -> None:
    here = os.path.relpath(K8S, tmp_path)
    wanted = {
        "namespace": NAMESPACE,
        "resources": [f"{here}/overlays/multi-node"],
        "components": [f"{here}/components/postgres"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    objects = render(tmp_path)
    for thing in objects:
        assert not complaints(thing)
    head = groups(objects)["head"]
    (secret,) = yaml.safe_load_all((K8S / "examples" / "ledger-secret.yaml").read_text())
    assert set(secret["stringData"].values()) == {""}  # no real secret
    (password,) = [entry for entry in container(head)["env"] if entry["name"] == "PGPASSWORD"]
    reference = password["valueFrom"]["secretKeyRef"]
    assert reference == {"name": secret["metadata"]["name"], "key": next(iter(secret["stringData"]))}
    assert [thing["metadata"]["name"] for thing in of_kind(objects, "PersistentVolumeClaim")] == [
        "lightship-weights"
    ]
    database = Peer("databases", {"app": "postgres"})
    assert allowed(objects, Peer(NAMESPACE, pod_labels(head)), database, 5432)
    assert not allowed(objects, Peer(NAMESPACE, pod_labels(groups(objects)["decode"])), database, 5432)
