"""OpenTelemetry traces: one for each request that generates, sent to a collector over OTLP/HTTP where an endpoint is configured.

A trace is made when the request is over, from what was measured anyway: tracing costs a request in progress nothing, and a collector
that is away costs traces, never requests. Never any text of a prompt. Knows nothing of routes.

    POST /v1/chat/completions            the caller's `traceparent` is its parent, and decides whether it is recorded
      request                            one for each choice of the answer
        gateway, queue, prefill          up to the first token
        ship                             the first token until the caches had landed at the decode worker
        decode                           from then on
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.access_log import PREFIXES, Call
from cluster.activity import Ending

if TYPE_CHECKING:
    from opentelemetry.context import Context

Times = tuple[float, float]  # start and end, seconds since the epoch

QUEUED_SPANS = 4096  # beyond them the newest are dropped
SEND_TIMEOUT_S = 5


class Tracing:
    """Where the traces go. Raises ValueError where OpenTelemetry is not installed.

    endpoint: of a collector, without /v1/traces, such as http://collector:4318.
    """

    def __init__(self, endpoint: str, *, gateway: str) -> None:
        try:  # here: whoever does not trace need not have it
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ValueError(
                f"gateway.traces is set, but {error.name} is not installed: "
                "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
            ) from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "lightship", "service.instance.id": gateway})
        )
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUED_SPANS))
        self._tracer = self._provider.get_tracer("lightship")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, call: Call, headers: Mapping[str, str]) -> None:
        """Traces a call that has just ended. Other routes than those that generate are left out."""
        from opentelemetry.context import Context

        if call.path not in PREFIXES:
            return
        endings = call.answer.endings if call.answer else []
        context = self._span(
            f"{call.method} {call.path}",
            (call.arrived_at, call.arrived_at + call.seconds),
            parent=self._propagator.extract(dict(headers), Context()),
            is_server=True,
            failed=call.error is not None or any(ending.settlement.finish == "error" for ending in endings),
            attributes={
                "http.request.method": call.method,
                "url.path": call.path,
                "http.response.status_code": call.status,
                "error.type": call.error,
                "lightship.request_id": call.id,
                "lightship.client_id": call.client_id,
                "lightship.tenant": call.tenant and call.tenant.name,
            },
        )
        for ending in endings:
            self._request(ending, call.arrived_at + call.read_at - call.clock, context)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def _request(self, ending: Ending, admitted: float, parent: "Context") -> None:
        phases, settlement = ending.phases, ending.settlement
        ids = {"lightship.request_id": settlement.request_id}
        end = admitted + phases.total
        context = self._span(
            "request",
            (admitted, end),
            parent=parent,
            failed=settlement.finish == "error",
            attributes=ids
            | {
                "lightship.workers": ending.workers,
                "lightship.resumes": settlement.resumes,
                "lightship.nanodollars": ending.nanodollars,
                "gen_ai.usage.input_tokens": settlement.hit_tokens + settlement.miss_tokens,
                "gen_ai.usage.cache_read.input_tokens": settlement.hit_tokens,
                "gen_ai.usage.output_tokens": settlement.output_tokens,
                "gen_ai.response.finish_reasons": [settlement.finish],
            },
        )
        if not phases.first_token:
            return
        # The worker said how long its parts took. They are laid so that they end with the first token.
        first = admitted + phases.first_token
        scheduled = max(admitted, first - phases.prefill)
        arrived = max(admitted, scheduled - phases.queue)
        landed = min(end, first + phases.ship)
        parts = {
            "gateway": (admitted, arrived),
            "queue": (arrived, scheduled),
            "prefill": (scheduled, first),
            "ship": (first, landed),
            "decode": (landed, end),
        }
        for name, times in parts.items():
            self._span(name, times, parent=context, attributes=ids)

    def _span(
        self,
        name: str,
        times: Times,
        *,
        parent: "Context",
        attributes: dict[str, Any],
        failed: bool = False,
        is_server: bool = False,
    ) -> "Context":
        """A span that is over. Returns the context of what lay inside it."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        start, end = (round(seconds * 1e9) for seconds in times)
        span = self._tracer.start_span(
            name,
            parent,
            kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
            start_time=start,
            attributes={key: value for key, value in attributes.items() if value is not None},
        )
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(end)
        return set_span_in_context(span, parent)
