"""The HTTP routes, OpenAI-compatible. Reads and writes bodies; what happens in between is `cluster.completion`."""

import asyncio
import logging
import time
from collections.abc import Callable
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
from cluster.admission import TIMEOUT_HEADER, Admission
from cluster.answer import Answer, Choice
from cluster.billing import Books
from cluster.chat_codec import ChatCodec
from cluster.completion import Completion
from cluster.config import ClusterConfig
from cluster.console import Console
from cluster.errors import (
    ApiError,
    DeadlineExceeded,
    MethodNotAllowed,
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
from cluster.public_prefix import PublicPrefixes
from cluster.responses import ChatReply, CompletionReply, ModelCard, ModelList, Reply, encode
from cluster.schemas import ChatRequest, GenerationRequest, Limits, parse_chat, parse_completion
from cluster.structured import StructuredOutput
from cluster.tenants import Tenant, Tenants
from cluster.tokenization import Detokenized, parse_detokenize, parse_tokenize, tokenize
from cluster.tokenizer import Tokenizer
from cluster.tracing import Tracing
from cluster.usage import days_of, report
from workers.page_hash import page_hashes
from workers.request import Grammar, SamplingParams

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
        tenants: Tenants,
    ) -> None:
        self._config = config
        self._limits = limits
        self._tokenizer = tokenizer
        self._codec = codec
        self._structured = structured
        self._tenants = tenants
        self._admission = Admission(config, tenants)
        self._public = PublicPrefixes.load(config.public_prefixes, tokenizer, codec)
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
        trace = None if tracing is None else tracing.record
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
        call = Call.of(request)
        tenant = call.tenant = self._tenants.of(request.headers.get("authorization"))
        self._admission.show(call, tenant)
        return tenant

    def _admit(self, request: Request) -> Tenant:
        """Whose request it is, if there is room for one more."""
        tenant, call = self._tenant(request), Call.of(request)
        content_type = request.headers.get("content-type", "application/json")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMedia(content_type)
        call.deadline = self._admission.deadline(request.headers.get(TIMEOUT_HEADER))
        self._admission.enter(call, tenant)
        return tenant

    async def _body(self, request: Request) -> bytes:
        limit = self._config.gateway.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout_at(Call.of(request).deadline):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise TooLarge(max_bytes=limit)
        except TimeoutError:
            raise DeadlineExceeded("the request's time was up before its body was whole") from None
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
        """All choices of the first prompt, then those of the second. Raises ContextTooLong, RateLimited and Overloaded.

        thinking: the replies begin with reasoning. may_call: they may hold tool calls
        """
        single = len(prompts) * wanted.n == 1
        samplings = self._samplings(tenant, wanted, prompts, grammar)
        on_begun = self._admission.reserve(
            call,
            tenant,
            prompts=[len(prompt) for prompt in prompts],
            output_tokens=wanted.n * sum(sampling.max_tokens for sampling in samplings),
        )
        choices: list[Choice] = []
        for prompt, sampling, begun in zip(prompts, samplings, on_begun, strict=True):
            num_public_pages = self._public.num_pages(prompt)
            hashes = page_hashes(tenant.namespace, prompt, num_public_pages=num_public_pages)
            leader = None
            for number in range(wanted.n):
                flight = Flight(
                    id=call.id if single else f"{call.id}-{len(choices)}",
                    prompt=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=sampling.seed + number),
                    namespace=tenant.namespace,
                    page_hashes=hashes,
                    num_public_pages=num_public_pages,
                    flow=tenant.name,
                    deadline=call.deadline,
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
                choices.append(self._choice(call, flight, output, tenant, wanted, leader, begun))
                leader = leader or choices[-1]
        return choices

    def _samplings(
        self, tenant: Tenant, wanted: GenerationRequest, prompts: list[list[int]], grammar: Grammar | None
    ) -> list[SamplingParams]:
        """Of each prompt. An answer whose length is left open is no longer than the tenant's tokens a minute allow."""
        samplings = [wanted.sampling(self._limits, len(prompt), grammar) for prompt in prompts]
        longest = self._admission.longest_answer(
            tenant, prompt_tokens=sum(map(len, prompts)), num_answers=wanted.n * len(prompts)
        )
        if wanted.max_output is not None or longest is None:
            return samplings
        return [
            msgspec.structs.replace(sampling, max_tokens=min(sampling.max_tokens, longest))
            for sampling in samplings
        ]

    def _choice(
        self,
        call: Call,
        flight: Flight,
        output: Output,
        tenant: Tenant,
        wanted: GenerationRequest,
        leader: Choice | None,
        on_begun: Callable[[], None],
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
            on_begun=on_begun,
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
