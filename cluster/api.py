"""The HTTP routes, OpenAI-compatible. Reads and writes bodies; what happens in between is `cluster.completion`."""

import logging
import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from cluster import console, explanation
from cluster.access_log import AccessLog, Call
from cluster.activity import Activity
from cluster.answer import Answer, Choice
from cluster.billing import Books
from cluster.chat_codec import ChatCodec
from cluster.completion import Completion
from cluster.config import ClusterConfig
from cluster.console import Console
from cluster.errors import (
    ApiError,
    MethodNotAllowed,
    RateLimited,
    TooLarge,
    UnknownModel,
    UnknownPath,
    UnsupportedMedia,
)
from cluster.fleet import Fleet
from cluster.flight import Flight, Pilot, Timing
from cluster.logprobs import ChatLogprobsWriter, CompletionLogprobsWriter
from cluster.metrics import CONTENT_TYPE_LATEST, Metrics
from cluster.openapi import document
from cluster.output import Output
from cluster.responses import ChatReply, CompletionReply, ModelCard, ModelList, Reply, encode
from cluster.schemas import ChatRequest, GenerationRequest, Limits, parse_chat, parse_completion
from cluster.structured import StructuredOutput
from cluster.tenants import Tenant, Tenants
from cluster.tokenization import Detokenized, parse_detokenize, parse_tokenize, tokenize
from cluster.tokenizer import Tokenizer
from cluster.tracing import Tracing
from cluster.usage import days_of, report
from workers.page_hash import page_hashes
from workers.request import Grammar

log = logging.getLogger(__name__)


STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
NOT_KEPT = {"cache-control": "no-store"}


class Api:
    """The route handlers of one gateway."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        limits: Limits,
        tokenizer: Tokenizer,
        codec: ChatCodec,
        structured: StructuredOutput,
        pilot: Pilot,
        books: Books,
        metrics: Metrics,
        fleet: Fleet,
    ) -> None:
        self._config = config
        self._limits = limits
        self._tokenizer = tokenizer
        self._codec = codec
        self._structured = structured
        self._tenants = Tenants(config.tenants)
        self._pilot = pilot
        self._books = books
        self._metrics = metrics
        self._fleet = fleet
        self._activity = Activity()
        self._console = Console(fleet, pilot, self._activity)
        self._page = console.files()
        self._started = int(time.time())

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/usage", self.usage),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/openapi.json", self.openapi),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/console/state", self.console_state),
            *(Route(path, self.page) for path in self._page),
        ]

    def app(self, *, echoes_id: bool = True, tracing: Tracing | None = None) -> ASGIApp:
        """echoes_id False: a proxy in front puts x-request-id on every answer."""
        handlers = {ApiError: self._api_error, HTTPException: self._http_error, Exception: self._fault}
        app = Starlette(routes=self.routes, exception_handlers=handlers)  # type: ignore[arg-type]
        trace = tracing and tracing.record
        return AccessLog(app, refuse=self._api_error, echoes_id=echoes_id, trace=trace)

    async def chat(self, request: Request) -> Response:
        tenant = self._admit(request)
        wanted = parse_chat(await self._body(request), self._limits)
        tools = wanted.offered_tools
        prompt = self._codec.encode(
            wanted.messages,
            thinking=wanted.thinks,
            tools=tools,
            response_format=wanted.response_format,
        )
        reply = ChatReply(**self._identity(request, wanted))
        grammar = await self._structured.grammar(
            thinking=prompt.thinking,
            tools=tools,
            choice=wanted.tool_choice,
            parallel=wanted.parallel_tool_calls,
            response_format=wanted.response_format,
        )
        choices = self._choices(
            Call.of(request),
            tenant,
            wanted,
            [prompt.tokens],
            thinking=prompt.thinking,
            may_call=bool(tools),
            grammar=grammar,
        )
        return await self._answer(request, wanted, reply, choices)

    async def complete(self, request: Request) -> Response:
        tenant = self._admit(request)
        wanted = parse_completion(await self._body(request), self._limits)
        prompts = [
            self._tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in wanted.prompt
        ]
        reply = CompletionReply(**self._identity(request, wanted))
        choices = self._choices(Call.of(request), tenant, wanted, prompts)
        if wanted.echo:
            for index, choice in enumerate(choices):
                prompt = wanted.prompt[index // wanted.n]
                choice.echo = prompt if isinstance(prompt, str) else self._tokenizer.text(prompt)
        return await self._answer(request, wanted, reply, choices)

    async def models(self, request: Request) -> Response:
        self._tenant(request)
        card = ModelCard(
            id=self._config.served_model_name,
            created=self._started,
            max_model_len=self._limits.max_context,
            vocab_size=self._limits.vocab_size,
        )
        return _json(encode(ModelList(data=[card])))

    async def usage(self, request: Request) -> Response:
        """The calling key's own, nobody else's."""
        tenant = self._tenant(request)
        first, last = days_of(request.query_params)
        days = await self._books.days(tenant.name, tenant.key_id, first, last)
        return _json(encode(report(days, first, last)))

    async def tokenize(self, request: Request) -> Response:
        self._tenant(request)
        wanted = parse_tokenize(await self._body(request))
        self._check_model(wanted.model)
        return _json(encode(tokenize(wanted, self._tokenizer, self._codec, self._limits.max_context)))

    async def detokenize(self, request: Request) -> Response:
        self._tenant(request)
        wanted = parse_detokenize(await self._body(request), self._limits.vocab_size)
        self._check_model(wanted.model)
        return _json(encode(Detokenized(prompt=self._tokenizer.text(wanted.tokens))))

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document(self._config.served_model_name, self._limits))

    async def health(self, request: Request) -> Response:
        """Alive: this process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """A real token has gone gateway -> prefill -> decode -> gateway through every pair that there is."""
        state = self._fleet.state()
        return _json(encode(state), status=200 if state.ready else 503)

    async def metrics(self, request: Request) -> Response:
        self._metrics.observe_gateway(
            ready=self._fleet.state().ready,
            linked=len(self._fleet.linked_pairs()),
            routable=len(self._fleet.routable_pairs()),
            queued_tokens=self._pilot.queued_tokens,
            unsettled=self._books.num_unsettled,
        )
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def console_state(self, request: Request) -> Response:
        """The workers, and the caller's own requests."""
        return _json(encode(self._console.state(self._tenant(request).name)), NOT_KEPT)

    async def page(self, request: Request) -> Response:
        return self._page[request.url.path]

    def _tenant(self, request: Request) -> Tenant:
        """Whose request it is. Raises Unauthorized."""
        tenant = Call.of(request).tenant = self._tenants.of(request.headers.get("authorization"))
        return tenant

    def _admit(self, request: Request) -> Tenant:
        """Whose request it is, if there is room for one more."""
        tenant = self._tenant(request)
        content_type = request.headers.get("content-type", "application/json")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMedia(content_type)
        limits = self._config.gateway
        if self._pilot.in_progress >= limits.max_concurrency:
            raise RateLimited(
                f"{limits.max_concurrency} requests are in progress, which is this gateway's limit"
            )
        if self._pilot.queued_tokens >= limits.max_queued_tokens:
            raise RateLimited(
                f"{limits.max_queued_tokens} prompt tokens are queued, which is this gateway's limit"
            )
        return tenant

    async def _body(self, request: Request) -> bytes:
        limit = self._config.gateway.max_body_bytes
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise TooLarge(max_bytes=limit)
        Call.of(request).read_at = time.monotonic()
        return bytes(body)

    def _check_model(self, model: str) -> None:
        if model != self._config.served_model_name:
            raise UnknownModel(model)

    def _identity(self, request: Request, wanted: GenerationRequest) -> dict[str, Any]:
        """What begins a Reply."""
        self._check_model(wanted.model)
        return {
            "id": Call.of(request).id,
            "model": wanted.model,
            "created": int(time.time()),
            "include_usage": wanted.include_usage,
        }

    def _choices(
        self,
        call: Call,
        tenant: Tenant,
        wanted: GenerationRequest,
        prompts: list[list[int]],
        *,
        thinking: bool = False,
        may_call: bool = False,
        grammar: Grammar | None = None,
    ) -> list[Choice]:
        """All choices of the first prompt, then those of the second. Raises ContextTooLong.

        thinking: the replies begin with reasoning. may_call: they may hold tool calls
        """
        single = len(prompts) * wanted.n == 1
        choices: list[Choice] = []
        for prompt in prompts:
            sampling = wanted.sampling(self._limits, len(prompt), grammar)
            hashes = page_hashes(tenant.namespace, prompt)
            leader = None
            for number in range(wanted.n):
                flight = Flight(
                    id=call.id if single else f"{call.id}-{len(choices)}",
                    prompt=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=sampling.seed + number),
                    namespace=tenant.namespace,
                    page_hashes=hashes,
                    wants_progress=wanted.return_progress,
                    wants_selected_pages=wanted.selected_pages,
                    timing=Timing(admitted_at=call.read_at),
                )
                output = Output(
                    self._tokenizer,
                    thinking=thinking,
                    stop=wanted.stops,
                    stop_token_ids=wanted.stop_token_ids,
                    min_tokens=wanted.min_tokens,
                    parser=self._codec.parser() if may_call else None,
                )
                choices.append(self._choice(call, flight, output, tenant, wanted, leader))
                leader = leader or choices[-1]
        return choices

    def _choice(
        self,
        call: Call,
        flight: Flight,
        output: Output,
        tenant: Tenant,
        wanted: GenerationRequest,
        leader: Choice | None,
    ) -> Choice:
        completion = Completion(
            flight,
            output,
            tenant=tenant,
            model=wanted.model,
            pilot=self._pilot,
            books=self._books,
            metrics=self._metrics,
            activity=self._activity,
            client_id=call.client_id,
            bills_prompt=leader is None,
        )
        writer = ChatLogprobsWriter if isinstance(wanted, ChatRequest) else CompletionLogprobsWriter
        return Choice(completion, writer(self._tokenizer), leader)

    async def _answer(
        self, request: Request, wanted: GenerationRequest, reply: Reply, choices: list[Choice]
    ) -> Response:
        answer = Call.of(request).answer = Answer(
            reply,
            choices,
            include_usage=wanted.include_usage,
            explains_routing=explanation.is_wanted(request.headers.get(explanation.HEADER)),
        )
        if not wanted.stream:
            return _json(await answer.body())
        await answer.begin()
        return StreamingResponse(answer.events(), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def _api_error(self, request: Request, error: ApiError) -> Response:
        self._metrics.rejected(error)
        Call.of(request).error = error.code or error.type
        return _json(error.body(), error.headers, status=error.status)

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            return await self._api_error(request, MethodNotAllowed(request.url.path, allowed=allowed))
        return await self._api_error(request, UnknownPath(request.url.path))

    async def _fault(self, request: Request, error: Exception) -> Response:
        """Starlette raises the error again once this has been sent, so that it is logged whole."""
        log.error("%s failed: %r", Call.of(request).id, error)
        return await self._api_error(request, ApiError("an internal error; it has been logged"))


def _json(body: bytes, headers: dict[str, str] | None = None, *, status: int = 200) -> Response:
    return Response(body, status_code=status, headers=headers, media_type="application/json")
