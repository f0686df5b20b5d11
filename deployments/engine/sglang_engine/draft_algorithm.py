"""What SGLang knows of remote drafting; imported in its processes alone."""

from __future__ import annotations

from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo


class RemoteDrafting(CustomSpecAlgo):  # type: ignore[misc] # SGLang has no types here
    """What SGLang asks an algorithm about itself; as its NGRAM, which has no draft model either."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever NGRAM answers
        """SGLang's own class for registered algorithms lacks some of the questions."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(SpeculativeAlgorithm.NGRAM, name)

    def is_ngram(self) -> bool:  # noqa: D102 - SGLang's method
        return True

    def has_draft_kv(self) -> bool:  # noqa: D102
        return False
