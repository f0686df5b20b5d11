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


@contextmanager
def stop_on_signals(on_repeat: Callable[[], None]) -> Iterator[None]:
    """Raise ``StopRequestedError`` in the main thread at the first stop signal.

    Args:
        on_repeat: called at every further one, while the stop is under way.
    """
    stopping = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        del frame
        if stopping:
            on_repeat()
            return
        stopping = True
        raise StopRequestedError(signum)

    before = {signum: signal.signal(signum, handle) for signum in _STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
