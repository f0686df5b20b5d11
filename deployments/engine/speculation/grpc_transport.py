"""The target's end of a stream over gRPC. All of gRPC's work is done by its own threads."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from deployments.engine.speculation.frame_queue import FrameQueue
from deployments.engine.speculation.transport import Received, TargetTransport, TransportState
from protos import draft_pb2

if TYPE_CHECKING:
    from pydantic import SecretStr

    from deployments.engine.config import PoolTlsConfig
    from deployments.engine.speculation.handshake import Identity
    from deployments.engine.speculation.transport import Connector

logger = logging.getLogger(__name__)

METHOD = "/paceline.draft.v1.DraftPool/Speculate"
SECRET_METADATA = "authorization"  # noqa: S105 - the name of the metadata, not a secret

_REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcLimits:
    """Bounds of the gRPC streams of one end.

    Attributes:
        max_frame_bytes: a larger frame ends its stream.
        max_queued_frames: per direction; see ``Transport.send`` for what happens beyond.
        max_streams: targets one drafter serves.
        hello_timeout_s: a target that connects and says nothing is cut off.
        keepalive_s: a peer that answers no ping for half as long again is taken for dead.
    """

    max_frame_bytes: int = 4 * 1024 * 1024
    max_queued_frames: int = 64
    max_streams: int = 64
    hello_timeout_s: float = 5.0
    keepalive_s: float = 10.0

    def options(self) -> list[tuple[str, int]]:
        """What both ends tell gRPC."""
        return [
            ("grpc.max_receive_message_length", self.max_frame_bytes),
            ("grpc.max_send_message_length", self.max_frame_bytes),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_s * 500)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Else a server takes pings on a quiet stream for an attack and ends it.
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.keepalive_s * 500)),
            ("grpc.enable_http_proxy", 0),
        ]


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom a target takes for a draft replica over TLS.

    Attributes:
        authority: PEM of the certificate that signed the replicas' own.
        server_name: what those are for.
    """

    authority: bytes
    server_name: str

    @classmethod
    def read(cls, tls: PoolTlsConfig) -> Trust:
        """As the files say now.

        Raises:
            OSError: they cannot be read.
        """
        return cls(tls.ca_file.read_bytes(), tls.server_name)


class GrpcTransport(TargetTransport):
    """One stream to one draft replica; dials in the background as soon as it is made.

    Args:
        endpoint: "host:port".
        hello: this target's first message.
        secret: shared by the replicas of a cluster.
        trust: whom to take for a draft replica; None means a plain connection.
    """

    def __init__(
        self,
        endpoint: str,
        hello: draft_pb2.Hello,
        secret: SecretStr,
        *,
        trust: Trust | None = None,
        limits: GrpcLimits | None = None,
    ) -> None:
        limits = limits or GrpcLimits()
        self._endpoint = endpoint
        self._state = TransportState.CONNECTING
        self._welcome: draft_pb2.Welcome | None = None
        self._refusal: str | None = None
        self._outbox: FrameQueue[draft_pb2.TargetFrame] = FrameQueue(limits.max_queued_frames)
        self._inbox: FrameQueue[Received[draft_pb2.DraftFrame]] = FrameQueue(
            limits.max_queued_frames
        )
        self._outbox.put(draft_pb2.TargetFrame(hello=hello))
        # A subchannel shared with an earlier stream would share its reconnect backoff as well.
        options = [*limits.options(), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = (
            grpc.insecure_channel(endpoint, options)
            if trust is None
            else grpc.secure_channel(
                endpoint,
                grpc.ssl_channel_credentials(trust.authority),
                [*options, ("grpc.ssl_target_name_override", trust.server_name)],
            )
        )
        speculate: grpc.StreamStreamMultiCallable[draft_pb2.TargetFrame, bytes] = (
            self._channel.stream_stream(
                METHOD, request_serializer=draft_pb2.TargetFrame.SerializeToString
            )
        )
        bearer = f"Bearer {secret.get_secret_value()}"
        self._call = speculate(iter(self._outbox.get, None), metadata=((SECRET_METADATA, bearer),))
        threading.Thread(target=self._read, name=f"draft-stream-{endpoint}", daemon=True).start()

    def send(self, frame: draft_pb2.TargetFrame) -> bool:
        """Queue a frame for gRPC's writer thread."""
        return self._state is TransportState.OPEN and self._outbox.put(frame)

    def receive(self) -> list[Received[draft_pb2.DraftFrame]]:
        """What the reader thread has decoded; if nobody asks for long, the oldest are dropped."""
        return self._inbox.drain()

    def close(self) -> None:
        """Cancel the call; the reader thread cleans up."""
        self._state = TransportState.CLOSED
        self._call.cancel()

    @property
    def state(self) -> TransportState:
        """Where the stream is in its life."""
        return self._state

    @property
    def num_dropped(self) -> int:
        """Frames dropped in either direction."""
        return self._outbox.num_dropped + self._inbox.num_dropped

    @property
    def welcome(self) -> draft_pb2.Welcome | None:
        """The drafter's answer to the hello."""
        return self._welcome

    @property
    def refusal(self) -> str | None:
        """The status a drafter that wants nothing to do with us ended the stream with."""
        return self._refusal

    def _read(self) -> None:
        try:
            for raw in self._call:
                frame = draft_pb2.DraftFrame.FromString(raw)
                if self._welcome is not None:
                    self._inbox.put_pushing_out(Received(frame, time.monotonic()))
                    if self.on_arrival is not None:
                        self.on_arrival()
                elif not frame.HasField("welcome"):
                    self._refusal = "the peer's first frame is no welcome"
                    return
                else:
                    self._welcome = frame.welcome
                    if self._state is TransportState.CONNECTING:
                        self._state = TransportState.OPEN
        except grpc.RpcError as error:
            code, details = self._call.code(), self._call.details()
            if code in _REFUSALS:
                self._refusal = f"{code.name}: {details}"
            logger.debug("draft stream to %s ended: %s (%s)", self._endpoint, code, error)
        except DecodeError:
            logger.warning("draft replica %s sent a frame that cannot be decoded", self._endpoint)
        finally:
            # The refusal must be known before the end is.
            self._state = TransportState.CLOSED
            self._call.cancel()
            self._outbox.close()
            self._channel.close()


def grpc_connector(
    identity: Identity,
    target_id: str,
    secret: SecretStr,
    *,
    tls: PoolTlsConfig | None = None,
    limits: GrpcLimits | None = None,
) -> Connector:
    """How a target with this identity dials draft replicas.

    Raises:
        OSError: the authority's file cannot be read.
    """
    hello = identity.hello(target_id)
    trust = None if tls is None else Trust.read(tls)

    def connect(endpoint: str) -> GrpcTransport:
        nonlocal trust
        if tls is not None:
            try:
                trust = Trust.read(tls)
            except OSError:
                logger.exception("the authority cannot be read; the last one stays trusted")
        return GrpcTransport(endpoint, hello, secret, trust=trust, limits=limits)

    return connect
