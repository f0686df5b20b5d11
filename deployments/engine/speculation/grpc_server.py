"""The drafter's end of all its streams over gRPC: handshake, bounds, one transport per stream.

Requests come in as bytes and are decoded here, so that a frame nobody can read ends its stream with
INVALID_ARGUMENT; gRPC's own decoding would call it an internal error.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from deployments.engine.speculation.errors import HandshakeError
from deployments.engine.speculation.frame_queue import FrameQueue
from deployments.engine.speculation.grpc_transport import METHOD, SECRET_METADATA, GrpcLimits
from deployments.engine.speculation.handshake import check_hello
from deployments.engine.speculation.transport import Received, Transport, TransportState
from protos import draft_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic import SecretStr

    from deployments.engine.config import PoolTlsConfig
    from deployments.engine.speculation.handshake import Identity
    from deployments.engine.speculation.transport import DraftTransport

logger = logging.getLogger(__name__)


class GrpcDraftTransport(Transport[draft_pb2.DraftFrame, draft_pb2.TargetFrame]):
    """The drafter's end of one stream.

    Received frames are never dropped: a full inbox stops the reading, gRPC's flow control stops the
    target's writing, and the target drops what it cannot queue.
    """

    def __init__(self, limits: GrpcLimits, on_arrival: Callable[[], None]) -> None:
        self.fault: str | None = None
        self.outbox: FrameQueue[draft_pb2.DraftFrame] = FrameQueue(limits.max_queued_frames)
        self.inbox: FrameQueue[Received[draft_pb2.TargetFrame]] = FrameQueue(
            limits.max_queued_frames
        )
        self._on_arrival = on_arrival
        self._state = TransportState.OPEN

    def send(self, frame: draft_pb2.DraftFrame) -> bool:
        """Queue a frame for the stream's writer."""
        return self.outbox.put(frame)

    def receive(self) -> list[Received[draft_pb2.TargetFrame]]:
        """What the reader thread has decoded."""
        return self.inbox.drain()

    def close(self) -> None:
        """End the stream."""
        self._state = TransportState.CLOSED
        self.outbox.close()
        self.inbox.close()
        self._on_arrival()

    @property
    def state(self) -> TransportState:
        """Where the stream is in its life."""
        return self._state

    @property
    def num_dropped(self) -> int:
        """Frames the target did not take in time."""
        return self.outbox.num_dropped

    def read(self, requests: Iterator[bytes]) -> None:
        """Decode until the stream ends or makes no sense; the reader thread's root."""
        try:
            for raw in requests:
                frame = draft_pb2.TargetFrame.FromString(raw)
                if not self.inbox.put_waiting(Received(frame, time.monotonic())):
                    return
                self._on_arrival()
        except DecodeError:
            self.fault = "a frame cannot be decoded"
        except Exception as error:  # noqa: BLE001 - gRPC ends a request iterator with a bare Exception
            logger.debug("a target's stream ended: %s", error)
        finally:
            self.close()


def _credentials(tls: PoolTlsConfig) -> grpc.ServerCredentials:
    """Those of the files, as they are at each handshake."""

    def read() -> grpc.ServerCertificateConfiguration:
        pair = tls.key_file.read_bytes(), tls.certificate_file.read_bytes()
        return grpc.ssl_server_certificate_configuration([pair])

    last = read()

    def renewed() -> grpc.ServerCertificateConfiguration:
        nonlocal last
        try:
            last = read()
        except (OSError, ValueError):
            logger.exception("the certificate cannot be read; the last one stays")
        return last

    return grpc.dynamic_ssl_server_credentials(last, renewed)


class GrpcDraftFront:
    """Listens for targets and hands on their streams.

    Args:
        secret: what targets must present.
        welcome: the answer to a hello that fits.
        accept: takes over a stream after the handshake.
        on_arrival: called from reader threads when any stream has news.
        tls: what to show to targets; None means plain connections.

    Raises:
        OSError: the files cannot be read.
    """

    def __init__(
        self,
        identity: Identity,
        secret: SecretStr,
        *,
        welcome: draft_pb2.Welcome,
        accept: Callable[[DraftTransport], None],
        on_arrival: Callable[[], None],
        tls: PoolTlsConfig | None = None,
        limits: GrpcLimits | None = None,
    ) -> None:
        self._identity = identity
        self._bearer = f"Bearer {secret.get_secret_value()}".encode()
        self._welcome = welcome
        self._accept = accept
        self._on_arrival = on_arrival
        self._credentials = None if tls is None else _credentials(tls)
        self._limits = limits or GrpcLimits()
        # A stream holds its handler's thread, so there are as many threads as streams.
        self._threads = ThreadPoolExecutor(
            self._limits.max_streams, thread_name_prefix="draft-stream"
        )
        self._server = grpc.server(
            self._threads,
            options=[
                *self._limits.options(),
                ("grpc.so_reuseport", 0),
                (
                    "grpc.http2.min_recv_ping_interval_without_data_ms",
                    int(self._limits.keepalive_s * 500),
                ),
            ],
            maximum_concurrent_rpcs=self._limits.max_streams,
        )
        service, method = METHOD.strip("/").split("/")
        handler: grpc.RpcMethodHandler[bytes, draft_pb2.DraftFrame] = (
            grpc.stream_stream_rpc_method_handler(
                self._speculate, response_serializer=draft_pb2.DraftFrame.SerializeToString
            )
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )

    def start(self, host: str, port: int = 0) -> int:
        """Listen.

        Returns:
            The port; a free one if ``port`` is 0.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        address = f"{host}:{port}"
        bound = (
            self._server.add_insecure_port(address)
            if self._credentials is None
            else self._server.add_secure_port(address, self._credentials)
        )
        self._server.start()
        return bound

    def stop(self) -> None:
        """Cancel all streams and wait for their threads."""
        self._server.stop(grace=None).wait()
        self._threads.shutdown(wait=True)

    def _speculate(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[draft_pb2.DraftFrame]:
        presented = dict(context.invocation_metadata()).get(SECRET_METADATA, "")
        if not hmac.compare_digest(str(presented).encode(), self._bearer):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong secret")
        transport = GrpcDraftTransport(self._limits, self._on_arrival)
        if not context.add_callback(transport.close):
            return
        threading.Thread(
            target=transport.read, args=(requests,), name="draft-stream-reader", daemon=True
        ).start()
        self._greet(transport, context)
        yield draft_pb2.DraftFrame(welcome=self._welcome)
        self._accept(transport)
        self._on_arrival()
        yield from iter(transport.outbox.get, None)
        if transport.fault is not None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, transport.fault)

    def _greet(self, transport: GrpcDraftTransport, context: grpc.ServicerContext) -> None:
        first = transport.inbox.get(self._limits.hello_timeout_s)
        if first is None:
            fault = transport.fault or "no hello in time"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, fault)
        elif not first.frame.HasField("hello"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first frame is no hello")
        else:
            try:
                check_hello(self._identity, first.frame.hello)
            except HandshakeError as error:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            logger.info("target %s has connected", first.frame.hello.target_id)
