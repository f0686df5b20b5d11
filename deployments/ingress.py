"""The ingress: OpenAI-compatible HTTP and gRPC in, a token stream out.

A request, from top to bottom: authenticate and admit (``call``), parse (``openai_api`` or
``grpc_api``), tokenise and plan (``generation``), stream from the target pool (``target_client``),
and shape the answer (``openai_answers`` or ``grpc_api``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, TypeVar

from ray import serve

from deployments import grpc_api
from deployments.accounting import RequestTotals
from deployments.admission import AdmissionGate
from deployments.call import REPLICA_HEADER, CallGuard
from deployments.embedding import Embeddings
from deployments.errors import ModelNotFoundError, RequestInvalidError, describe
from deployments.generation import Generation, Plan
from deployments.grpc_health import HealthService
from deployments.heap import settle_heap
from deployments.http_app import (
    EventStream,
    HttpApp,
    HttpRoute,
    error_response,
    json_response,
    read_body,
)
from deployments.metrics import IngressMetrics
from deployments.model_files import context_length, model_folder, served_model_name
from deployments.openai_answers import AnswerWriter, embeddings_body, model_body, sse_error
from deployments.openai_api import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingsRequest,
    parse_body,
)
from deployments.target_client import TargetClient
from deployments.target_probe import TargetProbe
from deployments.tenants import TenantDirectory
from deployments.tokenizer import ChatTurn, Tokenizer
from deployments.tracing import Tracing
from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from grpc_health.v1 import health_pb2
    from ray.serve.grpc_util import RayServegRPCContext
    from starlette.requests import Request
    from starlette.responses import Response

    from deployments.config import AuthConfig, IngressConfig, TracingConfig
    from deployments.engine.config import EngineConfig
    from deployments.generation import CallContext
    from deployments.openai_api import OpenAIRequest
    from deployments.serve_compat import Handle

B = TypeVar("B", "OpenAIRequest", EmbeddingsRequest)

logger = logging.getLogger(__name__)


class IngressReplica:
    """One replica of the public surfaces."""

    def __init__(
        self,
        target: Handle,
        *,
        engine: EngineConfig,
        cache_dir: Path,
        config: IngressConfig,
        auth: AuthConfig,
        tracing: TracingConfig,
    ) -> None:
        """Load the tokenizer and wrap the target pool.

        Args:
            target: handle of the target deployment.
            engine: for the model's name and its length limit.
            cache_dir: where models lie that are not local folders.
            config: limits.
            auth: tenants and their keys.
            tracing: where spans go.
        """
        self._config = config
        self._model = served_model_name(engine)
        folder = model_folder(engine.model, cache_dir)
        self._max_model_len = context_length(engine, folder)
        self._created = int(time.time())
        self._metrics = IngressMetrics()
        self._tracing = Tracing(tracing, "paceline-ingress")
        self._tokenizer = Tokenizer.load(folder)
        self._bytes_of = self._tokenizer.token_bytes
        client = TargetClient(
            target, max_resumes=config.max_resumes, on_resume=self._metrics.resumed
        )
        self._generation = Generation(
            self._tokenizer, client, config, self._metrics, max_model_len=self._max_model_len
        )
        self._embeddings = Embeddings(
            self._generation, client, config, self._metrics, max_model_len=self._max_model_len
        )
        gate = AdmissionGate(config.max_concurrent_requests)
        self._guard = CallGuard(config, TenantDirectory(auth), gate, self._tracing, self._model)
        self._probe = TargetProbe(target)
        self._health = HealthService(self._probe)
        settle_heap()

    async def __del__(self) -> None:
        """Serve's shutdown hook, called once every request has ended."""
        # Either may take a while: the last prompts' disk, the last spans' collector.
        await asyncio.to_thread(self._generation.close)
        await asyncio.to_thread(self._tracing.close)

    def __serve_build_asgi_app__(self) -> HttpApp:
        """What Serve runs behind HTTP."""
        return HttpApp(
            HttpRoute("POST", "/v1/chat/completions", self.chat_completions),
            HttpRoute("POST", "/v1/completions", self.completions),
            HttpRoute("POST", "/v1/embeddings", self.embeddings),
            HttpRoute("GET", "/v1/models", self.models),
            HttpRoute("GET", "/v1/models/{model:path}", self.model),
            HttpRoute("GET", "/health", self.health),
        )

    async def chat_completions(self, request: Request) -> Response:
        """Chat completion, whole or streamed."""
        return await self._answer_http(request, "chat", ChatCompletionRequest)

    async def completions(self, request: Request) -> Response:
        """Plain completion, whole or streamed."""
        return await self._answer_http(request, "text_completion", CompletionRequest)

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts."""
        try:
            with self._guard.call("http", "embeddings", request.headers) as context:
                body = await self._body(request, EmbeddingsRequest, context)
                answer = await self._embeddings.embed(body.call(), context)
            content = embeddings_body(answer, self._model, body.encoding_format)
            return json_response(content, headers={REPLICA_HEADER: answer.replica_id})
        except Exception as error:  # noqa: BLE001 - root of the request
            return self._http_error(error)

    async def models(self, request: Request) -> Response:
        """The one model served here."""
        try:
            self._guard.authenticate(request.headers)
        except Exception as error:  # noqa: BLE001 - root of the request
            return self._http_error(error)
        body = model_body(self._model, self._created, self._max_model_len)
        return json_response({"object": "list", "data": [body]})

    async def model(self, request: Request) -> Response:
        """One model by its id."""
        try:
            self._guard.authenticate(request.headers)
            self._check_model(request.path_params["model"])
        except Exception as error:  # noqa: BLE001 - root of the request
            return self._http_error(error)
        return json_response(model_body(self._model, self._created, self._max_model_len))

    async def health(self, _: Request) -> Response:
        """200 while a target replica answers, else 503."""
        ready = await self._probe.is_ready()
        return json_response({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)

    async def Generate(  # noqa: N802 - the RPC's name
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """Stream text as it is generated."""
        try:
            with self._guard.call("grpc", "text_completion", _metadata(grpc_context)) as context:
                plan = await self._plan_grpc(request, context)
                totals = RequestTotals(plan.prompt_lengths)
                async with aclosing(self._generation.stream(plan, totals)) as arrivals:
                    num_open = len(plan.requests)
                    async for deltas in arrivals:
                        for delta in deltas:
                            num_open -= delta.finish_reason is not None
                            end = None if num_open else totals
                            yield grpc_api.chunk_message(plan, delta, end, self._bytes_of)
        except Exception as error:  # noqa: BLE001 - root of the request
            self._grpc_error(error, grpc_context)
            # Serve's Python proxy learns of a stream's status only together with a message.
            yield pb.GenerateChunk()

    async def GenerateUnary(  # noqa: N802
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        """The same generation as one answer."""
        try:
            with self._guard.call("grpc", "text_completion", _metadata(grpc_context)) as context:
                plan = await self._plan_grpc(request, context)
                totals = RequestTotals(plan.prompt_lengths)
                builder = grpc_api.ResponseBuilder(plan, self._model, self._bytes_of)
                async with aclosing(self._generation.stream(plan, totals)) as arrivals:
                    async for deltas in arrivals:
                        for delta in deltas:
                            builder.collect(delta)
                return builder.build(totals)
        except Exception as error:  # noqa: BLE001 - root of the request
            self._grpc_error(error, grpc_context)
            return pb.GenerateResponse()

    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, grpc_context: RayServegRPCContext
    ) -> pb.EmbedResponse:
        """Vectors of texts."""
        try:
            with self._guard.call("grpc", "embeddings", _metadata(grpc_context)) as context:
                self._check_model(request.model)
                answer = await self._embeddings.embed(grpc_api.embedding_call(request), context)
            return grpc_api.embed_response(answer, self._model)
        except Exception as error:  # noqa: BLE001 - root of the request
            self._grpc_error(error, grpc_context)
            return pb.EmbedResponse()

    async def ModelInfo(  # noqa: N802
        self, request: pb.ModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.ModelInfoResponse:
        """What is served here."""
        try:
            self._guard.authenticate(_metadata(grpc_context))
        except Exception as error:  # noqa: BLE001 - root of the request
            self._grpc_error(error, grpc_context)
            return pb.ModelInfoResponse()
        return pb.ModelInfoResponse(
            model=self._model,
            max_model_len=self._max_model_len,
            vocab_size=self._tokenizer.vocab_size,
            has_chat_template=self._tokenizer.has_chat_template,
            max_choices=self._config.max_choices,
        )

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """``grpc.health.v1``: the state now."""
        return await self._health.check(request, grpc_context)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """``grpc.health.v1``: every change of the state."""
        async with aclosing(self._health.watch(request, grpc_context)) as states:
            async for state in states:
                yield state

    async def _answer_http(
        self, request: Request, operation: str, body_type: type[OpenAIRequest]
    ) -> Response:
        try:
            with ExitStack() as call:
                context = call.enter_context(self._guard.call("http", operation, request.headers))
                body = await self._body(request, body_type, context)
                plan = await self._plan_http(body, context)
                writer = AnswerWriter(plan, self._model, body, self._bytes_of)
                if not body.stream:
                    return await self._whole_answer(plan, writer)
                # The call lasts as long as its stream.
                events = self._events(plan, writer, call.pop_all())
            # The first event is awaited here, so that what fails before it has a status.
            return EventStream(await anext(events), events)
        except Exception as error:  # noqa: BLE001 - root of the request
            return self._http_error(error)

    async def _body(self, request: Request, body_type: type[B], context: CallContext) -> B:
        raw = await read_body(request, self._config.max_body_bytes, context.deadline)
        body = parse_body(raw, body_type)
        self._check_model(body.model)
        return body

    async def _whole_answer(self, plan: Plan, writer: AnswerWriter) -> Response:
        totals = RequestTotals(plan.prompt_lengths)
        async with aclosing(self._generation.stream(plan, totals)) as arrivals:
            async for deltas in arrivals:
                for delta in deltas:
                    writer.collect(delta)
        return json_response(writer.body(totals), headers={REPLICA_HEADER: totals.replica_id})

    async def _events(
        self, plan: Plan, writer: AnswerWriter, call: ExitStack
    ) -> AsyncGenerator[bytes, None]:
        begun = False
        totals = RequestTotals(plan.prompt_lengths)
        try:
            with call:
                async with aclosing(self._generation.stream(plan, totals)) as arrivals:
                    async for deltas in arrivals:
                        events = [] if begun else writer.opening()
                        for delta in deltas:
                            events += writer.delta(delta)
                        begun = True
                        yield b"".join(events)
                yield b"".join(writer.closing(totals))
        except Exception as error:
            if not begun:
                raise
            yield sse_error(describe(self._counted("http", error)))

    async def _plan_http(self, body: OpenAIRequest, context: CallContext) -> Plan:
        if isinstance(body, ChatCompletionRequest):
            turns = [ChatTurn(message.role, message.text()) for message in body.messages]
            prompts = [await self._generation.encode_chat(turns, context)]
            prompt_param = "messages"
        elif isinstance(body, CompletionRequest):
            prompts = [
                await self._generation.encode_text(prompt, "prompt")
                if isinstance(prompt, str)
                else self._generation.check_token_ids(prompt, "prompt")
                for prompt in body.prompts()
            ]
            prompt_param = "prompt"
        else:
            raise TypeError(f"no plan for {type(body).__name__}")
        max_tokens, max_tokens_param = body.output_limit
        return self._generation.plan(
            prompts,
            body,
            context,
            constraints=await self._generation.constraints(body, body.structure),
            n=body.n or 1,
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            prompt_param=prompt_param,
            speculation=body.speculation,
            tpot_target_s=body.tpot_target_s,
        )

    async def _plan_grpc(self, request: pb.GenerateRequest, context: CallContext) -> Plan:
        self._check_model(request.model)
        kind = request.WhichOneof("prompt")
        if kind == "text":
            prompt = await self._generation.encode_text(request.text, "text")
        elif kind == "chat":
            prompt = await self._generation.encode_chat(grpc_api.chat_turns(request.chat), context)
        elif kind == "token_ids":
            prompt = self._generation.check_token_ids(request.token_ids.ids, "token_ids")
        else:
            raise RequestInvalidError("Missing required parameter: 'prompt'.", param="prompt")
        fields = grpc_api.sampling_fields(request.sampling)
        structure = grpc_api.structured_output(request.sampling)
        return self._generation.plan(
            [prompt],
            fields,
            context,
            constraints=await self._generation.constraints(fields, structure),
            n=grpc_api.num_choices(request),
            max_tokens=grpc_api.max_tokens(request.sampling),
            max_tokens_param="max_tokens",
            prompt_param=kind,
            speculation=request.speculation if request.HasField("speculation") else True,
            tpot_target_s=grpc_api.tpot_target_s(request),
        )

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise ModelNotFoundError(f"The model '{model[:256]}' does not exist.")

    def _http_error(self, error: Exception) -> Response:
        return error_response(describe(self._counted("http", error)))

    def _grpc_error(self, error: Exception, context: RayServegRPCContext) -> None:
        # The status is set and the method returns: an exception would be logged with a traceback
        # by Serve, once per bad request.
        described = describe(self._counted("grpc", error))
        context.set_code(described.kind.grpc_code)
        context.set_details(described.message)
        metadata = [("x-paceline-error-code", described.kind.code or described.kind.type)]
        if described.param is not None:
            metadata.append(("x-paceline-error-param", described.param))
        metadata.extend((name.lower(), value) for name, value in described.headers().items())
        context.set_trailing_metadata(metadata)

    def _counted(self, surface: str, error: Exception) -> Exception:
        self._metrics.error(surface, error)
        if describe(error).kind.http_status >= 500:
            logger.error("a request failed on the %s surface", surface, exc_info=error)
        return error


IngressDeployment = serve.deployment(name="ingress", max_ongoing_requests=512)(
    serve.ingress()(IngressReplica)
)


def _metadata(context: RayServegRPCContext) -> dict[str, str]:
    return {str(key): str(value) for key, value in context.invocation_metadata()}
