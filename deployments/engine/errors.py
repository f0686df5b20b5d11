"""What an engine may raise.

EngineError
├── RequestRejectedError      the request can never be served as asked (the client's fault)
├── EngineOverloadedError     no room now; carries a hint when to try again
├── DeadlineExceededError     the request's deadline passed before it finished
├── InvalidLogitsError        the model gave NaN or nothing finite for this request
├── WeightsMissingError       the model's files are not on this machine
├── UnsupportedModelError     the model asks for something this engine does not compute
├── WeightsMismatchError      the files' tensors are not the ones the model is made of
├── EngineSetupError          the engine asked for cannot be started as configured, or not here
└── EngineGoneError           this replica serves nothing more; another one can take over
    ├── EngineDeadError       the engine thread has died; the replica must be replaced
    └── EngineDrainingError   the replica is being stopped and takes no new requests
"""

from typing import Self


class EngineError(Exception):
    """Base of every error an engine raises on purpose."""


class RequestRejectedError(EngineError):
    """The request cannot be served by this engine, now or later.

    Args:
        message: what is wrong, in the client's words.
        param: the request field at fault, when one is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class EngineOverloadedError(EngineError):
    """The waiting queue is full.

    Args:
        message: what is full.
        retry_after_s: seconds after which a retry has a chance.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class DeadlineExceededError(EngineError):
    """The request's deadline passed before its last token."""


class InvalidLogitsError(EngineError):
    """The model's logits for this request are not numbers; other requests are not affected."""


class WeightsMissingError(EngineError):
    """The model's files cannot be found; the message names the command that fetches them."""


class UnsupportedModelError(EngineError):
    """The model's configuration asks for something this engine does not compute."""


class WeightsMismatchError(EngineError):
    """A tensor is missing, unknown, or of another shape; the message names it."""


class EngineSetupError(EngineError):
    """The engine cannot be started as configured, or not in this environment; says what to mend."""


class EngineGoneError(EngineError):
    """This engine serves nothing more; the request can go on at another replica.

    Args:
        message: why.
        replica_id: whose engine it is, once the replica has said so.
    """

    def __init__(self, message: str, replica_id: str = "") -> None:
        super().__init__(message, replica_id)
        self.message = message
        self.replica_id = replica_id

    def __str__(self) -> str:
        return self.message

    def at(self, replica_id: str) -> Self:
        """The same error, with the replica's name."""
        return type(self)(self.message, replica_id)


class EngineDeadError(EngineGoneError):
    """The engine thread has stopped; nothing more will come from this replica."""


class EngineDrainingError(EngineGoneError):
    """The replica is being stopped: it ends what it runs and takes nothing new."""
