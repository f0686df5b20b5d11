"""What speculation may raise. None of it ever reaches a request: drafts are only guesses.

SpeculationError
├── MalformedMessageError   a peer's message breaks the protocol; its session is quarantined
├── HandshakeError          the two ends of a stream do not fit together
├── DrafterFailedError      a drafter raised, or answered with something that is not an answer
└── DrafterLoadError        a configured drafter cannot be imported or built
"""


class SpeculationError(Exception):
    """Base of every error of this package."""


class MalformedMessageError(SpeculationError):
    """A message breaks the protocol; the text says how."""


class HandshakeError(SpeculationError):
    """The other end speaks another protocol, vocabulary, noise or model."""


class DrafterFailedError(SpeculationError):
    """A drafter raised, or its rows do not answer its queries."""


class DrafterLoadError(SpeculationError):
    """A drafter named in the configuration cannot be imported or built."""
