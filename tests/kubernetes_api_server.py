"""As much of a Kubernetes API server as kubectl needs for a dry run: discovery, and an answer to each object that is sent.

Objects are held against the schemas; nothing is kept, so every object is a new one. It speaks on loopback only.
"""

import http.server
import json
import threading
from typing import Any, Self

import yaml
from kubernetes_schemas import complaints

Object = dict[str, Any]
KINDS = {
    "v1": {
        "Namespace": "namespaces",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
        "ConfigMap": "configmaps",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Secret": "secrets",
    },
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"},
    "batch/v1": {"Job": "jobs"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "ray.io/v1": {"RayService": "rayservices"},
    "monitoring.coreos.com/v1": {"PodMonitor": "podmonitors"},
}


class ApiServer:
    """A context: listens from enter to exit."""

    def __init__(self) -> None:
        self.seen: list[str] = []  # of the objects that were sent and found good: "Kind/name"
        server = self

        class Handler(_Handler):
            seen = server.seen

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    seen: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        found = _discovery(path)
        self._answer(200 if found else 404, found or _status(404, "NotFound", f"{path} not found"))

    def do_POST(self) -> None:
        self._take()

    def do_PATCH(self) -> None:
        self._take()

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        thing = yaml.safe_load(body)
        found = complaints(thing)
        if found:
            self._answer(422, _status(422, "Invalid", "; ".join(found)))
            return
        self.seen.append(f"{thing['kind']}/{thing['metadata']['name']}")
        self._answer(201, thing)

    def _answer(self, status: int, body: Object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _status(code: int, reason: str, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


def _discovery(path: str) -> Object | None:
    groups = [version for version in KINDS if "/" in version]
    if path == "version":
        return {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
    if path == "api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "apis":
        found = [{"groupVersion": v, "version": v.partition("/")[2]} for v in groups]
        named = [
            {"name": v["groupVersion"].partition("/")[0], "versions": [v], "preferredVersion": v}
            for v in found
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
    if path == "openapi/v3":
        return {"paths": {_root(v): {"serverRelativeURL": f"/openapi/v3/{_root(v)}"} for v in KINDS}}
    for version, kinds in KINDS.items():
        if path == _root(version):
            return {
                "kind": "APIResourceList",
                "groupVersion": version,
                "resources": [_resource(kind, plural) for kind, plural in kinds.items()],
            }
        if path == f"openapi/v3/{_root(version)}":
            return _openapi(version, kinds)
    return None


def _root(version: str) -> str:
    return f"apis/{version}" if "/" in version else f"api/{version}"


def _resource(kind: str, plural: str) -> Object:
    return {
        "name": plural,
        "singularName": kind.lower(),
        "namespaced": kind != "Namespace",
        "kind": kind,
        "verbs": ["create", "get", "patch"],
    }


def _openapi(version: str, kinds: dict[str, str]) -> Object:
    """No more than says that the server itself looks for unknown fields."""
    group, _, name = version.rpartition("/")
    parameters = [{"name": name, "in": "query"} for name in ("dryRun", "fieldValidation", "fieldManager")]
    paths = {
        f"/{_root(version)}/{plural}/{{name}}": {
            "patch": {
                "parameters": parameters,
                "x-kubernetes-group-version-kind": {"group": group, "version": name, "kind": kind},
            }
        }
        for kind, plural in kinds.items()
    }
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.37.0"}, "paths": paths}
