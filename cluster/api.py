"""The HTTP routes, OpenAI-compatible. Reads and writes bodies; what happens in between is `cluster.completion`."""

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable

import msgspec
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.billing import Books
from cluster.chat_encoding import render
from cluster.completion import Completion, Part
from cluster.config import ClusterConfig
from cluster.controller import WorkerInfo
from cluster.errors import (
    ApiError,
    MethodNotAllowed,
    RateLimited,
    TooLarge,
    UnknownModel,
    UnknownPath,
    UnsupportedMedia,
)
from cluster.flight import Flight, Pilot
from cluster.metrics import CONTENT_TYPE_LATEST, Metrics
from cluster.output import Delta, Output
from cluster.responses import (
    DONE,
    ChatLogprobsWriter,
    ChatReply,
    CompletionLogprobsWriter,
    CompletionReply,
    ModelCard,
    ModelList,
    PromptProgress,
    encode,
    sse,
)
from cluster.schemas import GenerationRequest, Limits, parse_chat, parse_completion
from cluster.tenants import Tenant, Tenants
from cluster.tokenizer import Tokenizer
from workers.page_hash import page_hashes

log = logging.getLogger(__name__)


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to /ready. `pairs`: "prefill -> decode" and whether a real token has gone through the pair."""

    ready: bool
    pairs: dict[str, bool]
    workers: list[WorkerInfo]


STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Api:
    """The route handlers of one gateway."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        limits: Limits,
        tokenizer: Tokenizer,
        pilot: Pilot,
        books: Books,
        metrics: Metrics,
        state: Callable[[], ClusterState],
    ) -> None:
        self._config = config
        self._limits = limits
        self._tokenizer = tokenizer
        self._tenants = Tenants(config.tenants)
        self._pilot = pilot
        self._books = books
        self._metrics = metrics
        self._state = state
        self._started = int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
        ]
        handlers = {ApiError: self._api_error, HTTPException: self._http_error, Exception: self._fault}
        return Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]

    async def chat(self, request: Request) -> Response:
        tenant = self._admit(request)
        wanted = parse_chat(await self._body(request), self._limits)
        prompt = self._tokenizer.encode(render(wanted.messages, thinking=wanted.thinks))
        completion = self._begin("chatcmpl", tenant, wanted, prompt, thinking=wanted.thinks)
        reply = ChatReply(
            id=completion.flight.id,
            model=wanted.model,
            created=int(time.time()),
            include_usage=wanted.include_usage,
        )
        logprobs = ChatLogprobsWriter(self._tokenizer)
        return await self._answer(wanted, completion, reply, logprobs)

    async def complete(self, request: Request) -> Response:
        tenant = self._admit(request)
        wanted = parse_completion(await self._body(request), self._limits)
        prompt = wanted.prompt
        tokens = self._tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        completion = self._begin("cmpl", tenant, wanted, tokens, thinking=False)
        reply = CompletionReply(
            id=completion.flight.id,
            model=wanted.model,
            created=int(time.time()),
            include_usage=wanted.include_usage,
        )
        logprobs = CompletionLogprobsWriter(self._tokenizer)
        return await self._answer(wanted, completion, reply, logprobs)

    async def models(self, request: Request) -> Response:
        self._tenants.of(request.headers.get("authorization"))
        card = ModelCard(
            id=self._config.served_model_name,
            created=self._started,
            max_model_len=self._limits.max_context,
            vocab_size=self._limits.vocab_size,
        )
        return _json(encode(ModelList(data=[card])))

    async def health(self, request: Request) -> Response:
        """Alive: this process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """A real token has gone gateway -> prefill -> decode -> gateway through every pair that there is."""
        state = self._state()
        return _json(encode(state), status=200 if state.ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    def _admit(self, request: Request) -> Tenant:
        """Whose request it is, if there is room for one more."""
        tenant = self._tenants.of(request.headers.get("authorization"))
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
        return bytes(body)

    def _begin(
        self, prefix: str, tenant: Tenant, wanted: GenerationRequest, prompt: list[int], *, thinking: bool
    ) -> Completion:
        if wanted.model != self._config.served_model_name:
            raise UnknownModel(wanted.model)
        flight = Flight(
            id=f"{prefix}-{secrets.token_hex(12)}",
            prompt=prompt,
            sampling=wanted.sampling(self._limits, len(prompt)),
            namespace=tenant.namespace,
            page_hashes=page_hashes(tenant.namespace, prompt),
            wants_progress=wanted.return_progress,
            wants_selected_pages=wanted.selected_pages,
        )
        output = Output(
            self._tokenizer, thinking=thinking, stop=wanted.stops, stop_token_ids=wanted.stop_token_ids
        )
        return Completion(
            flight,
            output,
            tenant=tenant,
            model=wanted.model,
            pilot=self._pilot,
            books=self._books,
            metrics=self._metrics,
        )

    async def _answer(
        self,
        wanted: GenerationRequest,
        completion: Completion,
        reply: ChatReply | CompletionReply,
        logprobs: ChatLogprobsWriter | CompletionLogprobsWriter,
    ) -> Response:
        headers = {"x-request-id": completion.flight.id}
        parts = completion.parts()
        if not wanted.stream:
            body = await _whole(parts, completion, reply, logprobs)
            return _json(body, headers)
        first = await anext(parts)  # an error before the first event gets its own status
        events = _events(first, parts, completion, reply, logprobs, include_usage=wanted.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS | headers)

    async def _api_error(self, request: Request, error: ApiError) -> Response:
        self._metrics.rejected(error)
        return _json(error.body(), error.headers, status=error.status)

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            return await self._api_error(request, MethodNotAllowed(request.url.path, allowed=allowed))
        return await self._api_error(request, UnknownPath(request.url.path))

    async def _fault(self, request: Request, error: Exception) -> Response:
        """Starlette raises the error again once this has been sent, so that it is logged."""
        return await self._api_error(request, ApiError("an internal error; it has been logged"))


async def _whole(
    parts: AsyncGenerator[Part | PromptProgress, None],
    completion: Completion,
    reply: ChatReply | CompletionReply,
    logprobs: ChatLogprobsWriter | CompletionLogprobsWriter,
) -> bytes:
    """The body of an answer that is not streamed."""
    reasoning, content, tokens, entries = [], [], [], []
    async with contextlib.aclosing(parts):
        async for part in parts:
            assert isinstance(part, Part), "only a stream tells its progress"
            reasoning.append(part.delta.reasoning)
            content.append(part.delta.content)
            tokens += part.tokens
            entries += part.logprobs or []
    delta = Delta("".join(reasoning), "".join(content))
    written = logprobs.write(tokens, entries) if entries else None
    return reply.whole(
        delta,
        completion.finish_reason,
        completion.usage,
        completion.timing,
        written,  # type: ignore[arg-type]
        completion.debug,
    )


async def _events(
    first: Part | PromptProgress,
    parts: AsyncGenerator[Part | PromptProgress, None],
    completion: Completion,
    reply: ChatReply | CompletionReply,
    logprobs: ChatLogprobsWriter | CompletionLogprobsWriter,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. An error in mid-stream is an event of its own, and no [DONE] follows."""

    def event(part: Part | PromptProgress) -> bytes:
        if isinstance(part, PromptProgress):
            return reply.progress(part)
        written = logprobs.write(part.tokens, part.logprobs) if part.logprobs else None
        return reply.delta(part.delta, written)  # type: ignore[arg-type]

    async with contextlib.aclosing(parts):
        if isinstance(reply, ChatReply):
            yield reply.start()
        yield event(first)
        try:
            async for part in parts:
                yield event(part)
        except ApiError as error:
            yield sse(error.body())
            return
        yield reply.end(completion.finish_reason, UNSET if include_usage else completion.debug)
        if include_usage:
            yield reply.usage(completion.usage, completion.timing, completion.debug)
        yield DONE


def _json(body: bytes, headers: dict[str, str] | None = None, *, status: int = 200) -> Response:
    return Response(body, status_code=status, headers=headers, media_type="application/json")
