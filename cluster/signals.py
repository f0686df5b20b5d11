"""One signal stops the cluster in order; more of them do not break that off."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequestedError(BaseException):
    """Somebody asked this process to stop.

    Not an ``Exception``: no handler of ordinary errors on the way may swallow it.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _StopHandler:
    def __init__(self, on_repeat: Callable[[], None]) -> None:
        self._on_repeat = on_repeat
        self.stopping = False
        self.requested_by: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.stopping:
            self._on_repeat()
            return
        self.stopping = True
        self.requested_by = signum
        raise StopRequestedError(signum)


@contextmanager
def stop_on_signals(on_repeat: Callable[[], None]) -> Iterator[None]:
    """Raise ``StopRequestedError`` in the main thread at the first stop signal.

    Args:
        on_repeat: called instead at every one that comes while a stop is under way.
    """
    handler = _StopHandler(on_repeat)
    before = {signum: signal.signal(signum, handler) for signum in _STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def begin_stop() -> None:
    """Say that a stop is under way, whatever its reason, so that no signal breaks it off.

    Does nothing outside of ``stop_on_signals``.
    """
    for handler in _stop_handlers():
        handler.stopping = True


def check_stop_requested() -> None:
    """Raise again what the handler raised, where the code it interrupted may have lost it.

    Ray's compiled code does: it goes on as if nothing had been, or fails with a ``SystemError``.
    Does nothing outside of ``stop_on_signals``.

    Raises:
        StopRequestedError: a stop signal came.
    """
    for handler in _stop_handlers():
        if handler.requested_by is not None:
            raise StopRequestedError(handler.requested_by)


def _stop_handlers() -> list[_StopHandler]:
    handlers = map(signal.getsignal, _STOP_SIGNALS)
    return [handler for handler in handlers if isinstance(handler, _StopHandler)]


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Put the SIGTERM handler back that a library replaces within the context.

    ``ray.init`` installs its own, which exits without any order.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
