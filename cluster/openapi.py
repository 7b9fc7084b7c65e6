"""The OpenAPI document, made from the structs that the bodies are read and written with, so that it cannot be wrong about them."""

from typing import Any

import msgspec

from cluster import access_log, admission, console, explanation
from cluster.console import ConsoleState
from cluster.explanation import Routing
from cluster.fleet import ClusterState
from cluster.responses import ChatChoice, CompletionChoice, Debug, ModelList, Timing, Usage
from cluster.schemas import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    IGNORED,
    MESSAGE_IGNORED,
    MESSAGE_NEUTRAL,
    ChatRequest,
    CompletionRequest,
    Limits,
)
from cluster.tokenization import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from cluster.usage import UsageReport

Schema = dict[str, Any]
VERSION = "1"  # of the API, as in its paths
_REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_ANSWERS = (
    ChatChoice,
    CompletionChoice,
    Debug,
    ModelList,
    Timing,
    Usage,
    Routing,
    Tokenized,
    Detokenized,
    ClusterState,
    ConsoleState,
    UsageReport,
)
_DAYS: list[Schema] = [
    {
        "name": name,
        "in": "query",
        "description": f"{name} of the days, UTC",
        "schema": {"type": "string", "format": "date"},
    }
    for name in ("start", "end")
]
_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_REFUSALS = {
    "400": "a field is wrong; param names it",
    "401": "no API key, or an unknown one",
    "404": "no such model",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "429": "a limit is reached; retry-after says when to come back",
    "503": "no worker, no room or no ledger now; retry-after says when to come back",
    "504": "the request's time was up",
}
_ADMITTED = {"429", "504"}  # of requests that workers are needed for
_TIMEOUT: Schema = {
    "type": "number",
    "exclusiveMinimum": 0,
}  # seconds; the most is gateway.max_request_timeout_s
_RATE_LIMITS: dict[str, Schema] = {
    f"x-ratelimit-{what}-{of}": {
        "description": f"{text} of the tenant's {of} a minute; left out where there is no such limit",
        "schema": {"type": kind},
    }
    for what, text, kind in (
        ("limit", "the limit", "integer"),
        ("remaining", "what is left", "integer"),
        ("reset", "time until all is there again, such as 6m0s or 120ms,", "string"),
    )
    for of in ("requests", "tokens")
}


def document(model: str, limits: Limits) -> Schema:
    """The answer to /openapi.json. `model`: the one that is served."""
    _, components = msgspec.json.schema_components(
        [*_REQUESTS, *_ANSWERS], ref_template="#/components/schemas/{name}"
    )
    for struct in _REQUESTS:
        components[struct.__name__]["properties"]["model"] = {"type": "string", "enum": [model]}
    for name, neutral, ignored in (
        ("ChatRequest", CHAT_NEUTRAL, IGNORED),
        ("CompletionRequest", COMPLETION_NEUTRAL, IGNORED),
        ("Message", MESSAGE_NEUTRAL, MESSAGE_IGNORED),
    ):
        components[name]["properties"] |= _without_effect(neutral, ignored)
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    ids: Schema = {"type": "array", "items": token}
    one: list[Schema] = [{"type": "string", "minLength": 1}, ids | {"minItems": 1}]
    several = {"type": "array", "minItems": 1, "items": {"anyOf": one}}
    components["CompletionRequest"]["properties"]["prompt"] = {"anyOf": [*one, several]}
    for name in ("ChatRequest", "CompletionRequest"):
        components[name]["properties"]["stop_token_ids"]["items"] = token
        components[name]["properties"]["logit_bias"]["propertyNames"] = {"pattern": "^[0-9]{1,9}$"}
    components["DetokenizeRequest"]["properties"]["tokens"] = ids
    components |= {
        "Error": _ERROR,
        "ChatCompletion": _completion("chat.completion", "ChatChoice"),
        "TextCompletion": _completion("text_completion", "CompletionChoice"),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Lightship", "version": VERSION},
        "paths": {
            "/v1/chat/completions": {"post": _post("ChatRequest", "ChatCompletion", streams=True)},
            "/v1/completions": {"post": _post("CompletionRequest", "TextCompletion", streams=True)},
            "/v1/usage": {
                "get": {
                    "parameters": _DAYS,
                    "responses": _json("UsageReport") | _refusals("400", "401", "503"),
                }
            },
            "/tokenize": {"post": _post("TokenizeRequest", "Tokenized")},
            "/detokenize": {"post": _post("DetokenizeRequest", "Detokenized")},
            "/v1/models": {"get": {"responses": _json("ModelList") | _refusals("401", "503")}},
            "/ready": {
                "get": {"responses": _json("ClusterState") | {"503": _body("not yet", "ClusterState")}}
            },
            "/health": {"get": {"responses": {"200": {"description": "this process answers"}}}},
            "/metrics": {"get": {"responses": {"200": {"description": "in Prometheus' text format"}}}},
            "/console/state": {"get": {"responses": _json("ConsoleState") | _refusals("401", "503")}},
            **{path: _page(media_type) for path, (_, media_type) in console.FILES.items()},
            "/openapi.json": {"get": {"responses": {"200": {"description": "this document"}}}},
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _without_effect(neutral: dict[str, tuple[Any, ...]], ignored: frozenset[str]) -> dict[str, Schema]:
    """Fields that are taken from clients that send them, and change nothing."""
    only = {name: {"enum": [None, *values]} for name, values in neutral.items()}
    anything = {name: {"description": "taken, and without effect"} for name in sorted(ignored)}
    return only | anything


def _completion(kind: str, choice: str) -> Schema:
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": _ref(choice)},
            "usage": _ref("Usage"),
            "timing": _ref("Timing"),
            "debug": _ref("Debug"),
            "routing": {"type": "array", "items": _ref("Routing")},
        },
        "required": ["id", "object", "created", "model", "choices", "usage", "timing"],
    }


def _post(request: str, answer: str, *, streams: bool = False) -> Schema:
    responses = _json(answer)
    parameters = [_header(access_log.HEADER, {"type": "string", "pattern": "^[!-~]{1,128}$"})]
    if streams:
        parameters.append(_header(explanation.HEADER, {"enum": ["0", "1"]}))
        parameters.append(_header(admission.TIMEOUT_HEADER, _TIMEOUT))
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    responses |= _refusals(*_REFUSALS) if streams else _refusals(*(_REFUSALS.keys() - _ADMITTED))
    return {
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {
            status: response | {"headers": _RATE_LIMITS} for status, response in sorted(responses.items())
        },
    }


def _page(media_type: str) -> Schema:
    return {"get": {"responses": {"200": {"description": "the console", "content": {media_type: {}}}}}}


def _header(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "header", "schema": schema}


def _json(name: str) -> Schema:
    return {"200": _body("the answer", name)}


def _refusals(*statuses: str) -> Schema:
    return {status: _body(_REFUSALS[status], "Error") for status in statuses}


def _body(description: str, name: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(name)}}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
