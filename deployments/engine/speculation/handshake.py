"""Do the two ends of a stream mean the same thing by a token id and by noise?"""

from __future__ import annotations

from dataclasses import dataclass

from deployments.engine.speculation.errors import HandshakeError
from deployments.engine.speculation.noise import NOISE_VERSION
from protos import draft_pb2

PROTOCOL_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What one end of a stream is.

    Attributes:
        model: the model the target serves and the drafter was made for.
        vocab_digest: digest of the tokenizer's id -> token mapping; equal on both sides.
    """

    model: str
    vocab_size: int
    vocab_digest: str
    noise_version: int = NOISE_VERSION
    protocol_version: int = PROTOCOL_VERSION

    def hello(self, target_id: str) -> draft_pb2.Hello:
        """The target's first message."""
        return draft_pb2.Hello(
            protocol_version=self.protocol_version,
            vocab_size=self.vocab_size,
            vocab_digest=self.vocab_digest,
            noise_version=self.noise_version,
            target_id=target_id,
            model=self.model,
        )


def check_hello(identity: Identity, hello: draft_pb2.Hello) -> None:
    """Return if the target that said ``hello`` can use this drafter.

    Raises:
        HandshakeError: it cannot; the text names every field that differs, with both values.
    """
    pairs = {
        "protocol_version": (identity.protocol_version, hello.protocol_version),
        "model": (identity.model, hello.model),
        "vocab_size": (identity.vocab_size, hello.vocab_size),
        "vocab_digest": (identity.vocab_digest, hello.vocab_digest),
        "noise_version": (identity.noise_version, hello.noise_version),
    }
    wrong = [
        f"{name}: drafter has {ours!r}, target has {theirs!r}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if wrong:
        raise HandshakeError("; ".join(wrong))
