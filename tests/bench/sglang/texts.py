"""Texts that differ from plain decoding's: by rounding, or by more?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from deployments.engine.types import GenerationRequest, SamplingParams
from tests.bench.sglang.field import NONE
from tests.exactness import MAX_GAP, Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.bench.sglang.race import Answers, Question

Gap: TypeAlias = "Callable[[Sequence[int], Sequence[int]], float]"


def differences(
    asked: Sequence[Question],
    answers: Mapping[str, Sequence[Answers]],
    gap: Gap,
) -> dict[str, list[dict[str, Any]]]:
    """Where texts leave those of the contestant without drafts.

    Args:
        asked: the questions.
        answers: by contestant.
        gap: see ``float64_gap``.

    Returns:
        By contestant, per text that differs: the place, the gap, and whether rounding explains it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, own in answers.items():
        found[name] = []
        for question, answer, plain in zip(asked, own, answers[NONE], strict=False):
            texts = zip(question.prompts, answer.texts, plain.texts, strict=True)
            for prompt, ours, theirs in texts:
                if ours == theirs:
                    continue
                pairs = zip(ours, theirs, strict=False)
                at = next(
                    (i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs))
                )
                size = gap(prompt, theirs[:at])
                found[name].append({"token": at, "gap": size, "is_rounding": size < MAX_GAP})
    return found


def float64_gap(reference: Reference) -> Gap:
    """How far apart the two best logits behind a prompt and an output are, in float64."""

    def gap(prompt: Sequence[int], output_ids: Sequence[int]) -> float:
        request = GenerationRequest(
            request_id="",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=1, temperature=0.0, seed=0),
        )
        return reference.gap(request, output_ids)

    return gap
