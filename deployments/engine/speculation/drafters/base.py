"""The one interface of all drafters, wherever they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import DraftQuery, OutcomeRow, SessionSpec


class Drafter(ABC):
    """Guesses continuations. A wrong guess costs time, never a token: the target writes the text.

    Called from one thread. A draft replica hosts one for its sessions; a target hosts a cheap one
    for the steps in which no outcome row fits. Queries carry the whole committed text, so a
    drafter may keep a cache per session but never needs one to be correct.
    """

    def open(self, session: SessionSpec) -> None:  # noqa: B027 - stateless drafters need nothing
        """A session begins; its text is ``session.token_ids``."""

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:  # noqa: B027
        """Text was committed that no query need ever show; for drafters that learn from output.

        A host that learns of it calls this; unknown ids are ignored.
        """

    def close(self, session_id: int) -> None:  # noqa: B027
        """A session ended or was evicted; unknown ids are ignored."""

    @abstractmethod
    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """For each query, rows for the likely outcomes of its round, likeliest first.

        Args:
            queries: at most one per session. With an empty ``in_flight`` the outcomes are just
                bonus tokens behind the committed text (node -1).

        Returns:
            One list per query, in order; an empty list where there is nothing to say. Token ids
            are plain ``int``; rows with anything else are left out.
        """
