"""What a request carries through SGLang to our code in its scheduler.

SGLang hands ``SamplingParams.custom_params`` on as it is, as scalars in two levels of names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from deployments.engine.speculation.noise import choice_key

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from deployments.engine.types import GenerationRequest

CUSTOM_PARAMS_KEY = "paceline"

DRAFT_LINK = "PACELINE_SGLANG_DRAFT_LINK"
"""Environment variable of SGLang's processes: where the actor listens, see ``draft_link``."""

SPANS = "PACELINE_SGLANG_SPANS"
"""Likewise: where spans go, a ``SpanExport`` as JSON. Unset without tracing."""

Scalars: TypeAlias = "dict[str, bool | int | float | str | None]"


class SamplingRow(NamedTuple):
    """How a sequence's next token is chosen.

    Attributes:
        choice_key: see ``noise.choice_key``.
        temperature: 0 is greedy.
        top_k: 0 is off.
    """

    choice_key: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def own_params(request: GenerationRequest) -> Scalars:
    """What goes with a request."""
    sampling = request.sampling
    return {
        "request_id": request.request_id,
        "tenant": request.tenant,
        "seed": sampling.seed,
        "choice_index": request.choice_index,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "speculation": request.speculation,
        "tpot_target_s": request.tpot_target_s,
        "traceparent": request.traceparent,
    }


def read_own_params(custom_params: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What came with a request; None for SGLang's own, such as those that warm it up."""
    return (custom_params or {}).get(CUSTOM_PARAMS_KEY)


def sampling_row(params: Mapping[str, Any]) -> SamplingRow:
    """How the tokens of a request are chosen."""
    return SamplingRow(
        choice_key=choice_key(params["seed"], params["choice_index"]),
        temperature=params["temperature"],
        top_k=params["top_k"],
        top_p=params["top_p"],
        min_p=params["min_p"],
    )


GREEDY = SamplingRow(0, 0.0, 0, 1.0, 0.0)
"""SGLang's own requests: nobody reads their text."""
