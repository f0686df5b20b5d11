"""What speculation may raise. None of it ever reaches a request: drafts are only guesses.

SpeculationError
├── MalformedMessageError   a peer's message breaks the protocol; its session is quarantined
├── HandshakeError          the two ends of a stream do not fit together
├── DrafterFailedError      a drafter raised, or answered with something that is not an answer
├── DrafterDeadError        a drafter thread has died or hangs; its replica must be replaced
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


class DrafterDeadError(SpeculationError):
    """The thread that calls the drafter has died, or does not come back from a step."""


class DrafterLoadError(SpeculationError):
    """A drafter named in the configuration cannot be imported or built."""
