"""What an OpenTelemetry collector receives from a running gateway. The receiver here decodes the real protocol."""

import builtins
import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process_gateway import running_gateway
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cluster.config import ClusterConfig, ConfigError, GatewayConfig, load
from cluster.tracing import Tracing
from workers.tiny import write_tiny

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
PARTS = ["gateway", "queue", "prefill", "ship", "decode"]


class Collector:
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append(values(resource.resource))
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def of(self, trace_id: bytes) -> list[Span]:
        return [span for span in self.spans if span.trace_id == trace_id]


def values(holder: Any) -> dict[str, Any]:
    """Attributes of a span or a resource, as plain values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {attribute.key: plain(attribute.value) for attribute in holder.attributes}


def _chat(url: str, headers: dict[str, str], **more: Any) -> httpx.Response:
    body = {
        "model": "lightship",
        "messages": [{"role": "user", "content": "heliotrope " * 40}],
        "max_tokens": 5,
        "ignore_eos": True,
    }
    return httpx.post(f"{url}/v1/chat/completions", json=body | more, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Collector, dict[str, httpx.Response]]]:
    """What came of some requests to a gateway that has since been stopped, so that everything has been sent."""
    folder = tmp_path_factory.mktemp("tracing")
    write_tiny(folder / "model", num_hidden_layers=2)
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    config = ClusterConfig(gateway=GatewayConfig(traces=collector.url))
    try:
        with running_gateway(folder / "model", folder, config) as gateway:
            answers = {
                "parent": _chat(
                    gateway.url, {"traceparent": f"00-{TRACE_ID}-{CALLER}-01", "x-request-id": "mine"}
                ),
                "unsampled": _chat(gateway.url, {"traceparent": f"00-{'ab' * 16}-{CALLER}-00"}),
                "several": _chat(gateway.url, {}, n=2),
                "refused": _chat(gateway.url, {}, max_tokens=-1),
                "models": httpx.get(f"{gateway.url}/v1/models"),
            }
        yield collector, answers
    finally:
        collector.server.shutdown()
        collector.server.server_close()
        thread.join()


Traced = tuple[Collector, dict[str, httpx.Response]]


def test_a_request_in_its_parts_under_the_callers_span(traced: Traced) -> None:
    collector, answers = traced
    spans = collector.of(bytes.fromhex(TRACE_ID))
    by_name = {span.name: span for span in spans}
    assert [span.name for span in spans] == ["POST /v1/chat/completions", "request", *PARTS]
    root, request = by_name["POST /v1/chat/completions"], by_name["request"]
    assert root.parent_span_id == bytes.fromhex(CALLER)
    assert root.kind == Span.SPAN_KIND_SERVER
    assert request.parent_span_id == root.span_id
    request_id = answers["parent"].json()["id"]
    assert {values(span)["lightship.request_id"] for span in spans} == {request_id}
    about = values(root)
    assert (about["lightship.client_id"], about["lightship.tenant"]) == ("mine", "default")
    assert about["http.response.status_code"] == 200
    usage = answers["parent"].json()["usage"]
    about = values(request)
    assert about["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert about["gen_ai.usage.output_tokens"] == 5
    assert about["lightship.nanodollars"] == usage["cost_nanodollars"]
    assert about["lightship.workers"] == ["prefill-0", "decode-0"]
    assert collector.resources[0]["service.name"] == "lightship"


def test_the_parts_follow_each_other_and_fill_the_request(traced: Traced) -> None:
    collector, answers = traced
    by_name = {span.name: span for span in collector.of(bytes.fromhex(TRACE_ID))}
    request, parts = by_name["request"], [by_name[name] for name in PARTS]
    assert all(part.parent_span_id == request.span_id for part in parts)
    edges = [request.start_time_unix_nano, *(part.end_time_unix_nano for part in parts)]
    assert [part.start_time_unix_nano for part in parts] == edges[:-1]
    assert edges == sorted(edges)
    assert edges[-1] == request.end_time_unix_nano
    timing = answers["parent"].json()["timing"]
    for name in ("queue", "prefill", "ship"):
        span = by_name[name]
        assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(
            timing[name], abs=1e-4
        )
    root = by_name["POST /v1/chat/completions"]
    assert root.start_time_unix_nano <= edges[0]
    assert root.end_time_unix_nano >= edges[-1]
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 600  # of this day, not of a clock's beginning


def test_who_is_not_to_be_recorded_is_not(traced: Traced) -> None:
    collector, answers = traced
    assert answers["unsampled"].status_code == 200
    assert not collector.of(b"\xab" * 16)


def test_each_choice_has_a_part_of_its_own(traced: Traced) -> None:
    collector, answers = traced
    request_id = answers["several"].json()["id"]
    (root,) = [span for span in collector.spans if values(span).get("lightship.request_id") == request_id]
    trace = collector.of(root.trace_id)
    requests = [span for span in trace if span.name == "request"]
    assert {values(span)["lightship.request_id"] for span in requests} == {
        f"{request_id}-{n}" for n in (0, 1)
    }
    assert {span.parent_span_id for span in requests} == {root.span_id}
    assert not root.parent_span_id


def test_a_refused_request_is_one_failed_span(traced: Traced) -> None:
    collector, answers = traced
    assert answers["refused"].status_code == 400
    (refused,) = [span for span in collector.spans if values(span).get("http.response.status_code") == 400]
    assert refused.status.code == Status.STATUS_CODE_ERROR
    assert values(refused)["error.type"] == "invalid_request_error"
    assert len(collector.of(refused.trace_id)) == 1


def test_nothing_but_what_generates_is_traced_and_no_text_at_all(traced: Traced) -> None:
    collector, answers = traced
    assert answers["models"].status_code == 200
    assert not any("models" in span.name for span in collector.spans)
    assert not any("heliotrope" in str(span) for span in collector.spans)


def test_an_endpoint_is_a_url(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gateway.traces"):
        load(None, ["gateway.traces=collector:4318"])


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install opentelemetry-sdk"):
        Tracing("http://127.0.0.1:1", gateway="gateway-0")
