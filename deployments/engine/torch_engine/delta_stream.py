"""One request's way out: from the engine's hop on the event loop to the iterator that reads it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.engine.torch_engine.capture import joined

if TYPE_CHECKING:
    from deployments.engine.errors import EngineError
    from deployments.engine.types import TokenDelta


class DeltaStream:
    """Holds at most one unread delta: a reader slower than the engine gets longer deltas.

    Both ends live on the event loop.
    """

    def __init__(self) -> None:
        self._unread: TokenDelta | None = None
        self._error: EngineError | None = None
        self._changed = asyncio.Event()

    def push(self, content: TokenDelta | EngineError) -> None:
        """Add what the engine says; nothing may follow a terminal event."""
        if isinstance(content, Exception):
            self._error = content
        elif self._unread is None:
            self._unread = content
        else:
            unread = self._unread
            states = [s for s in (unread.hidden_states, content.hidden_states) if s is not None]
            self._unread = replace(
                content,
                token_ids=unread.token_ids + content.token_ids,
                logprobs=unread.logprobs + content.logprobs,
                prompt_logprobs=unread.prompt_logprobs or content.prompt_logprobs,
                hidden_states=joined(states),
            )
        self._changed.set()

    async def next(self) -> TokenDelta:
        """The next delta.

        Raises:
            EngineError: the request failed; deltas before that have been returned.
        """
        await self._changed.wait()
        if self._unread is not None:
            delta, self._unread = self._unread, None
            if self._error is None:
                self._changed.clear()
            return delta
        if self._error is None:
            raise RuntimeError("the stream was read past its end")
        raise self._error
