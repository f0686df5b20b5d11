"""What a call's engine requests carry."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from deployments.call import CallContext
from deployments.config import IngressConfig
from deployments.generation import Generation
from deployments.sampling import SamplingFields
from deployments.tokenizer import ChatTurn

CONTEXT = CallContext(
    surface="http",
    tenant=SimpleNamespace(name="one", tenant_key=bytes(32), priority=3),
    deadline=12.0,
    traceparent="00-1",
    avoid_replicas=(),
)


class ThreadTeller:
    """A tokenizer whose tokens say how many threads besides the event loop's encoded a text."""

    vocab_size = 100

    def encode(self, given: object) -> list[int]:
        del given
        return [threading.current_thread() is not threading.main_thread()]

    encode_chat = encode


@pytest.mark.parametrize(
    ("num_turns", "text", "is_threaded"),
    [(1, "a" * 1000, False), (1, "a" * 3000, True), (3, "a" * 900, True), (100, "", True)],
)
async def test_only_long_texts_leave_the_event_loop(
    num_turns: int, text: str, *, is_threaded: bool
) -> None:
    generation = Generation(
        ThreadTeller(), None, IngressConfig(), SimpleNamespace(logged=None), max_model_len=64
    )
    try:
        turns = [ChatTurn("user", text)] * num_turns
        assert await generation.encode_chat(turns, CONTEXT) == (is_threaded,)
        if num_turns == 1:
            assert await generation.encode_text(text, "prompt") == (is_threaded,)
    finally:
        generation.close()


def targets_of(tpot_target_s: float | None, **config: float) -> list[float | None]:
    generation = Generation(
        SimpleNamespace(vocab_size=100),
        None,
        IngressConfig(**config),
        SimpleNamespace(logged=None),
        max_model_len=64,
    )
    plan = generation.plan(
        [(1, 2)],
        SamplingFields(),
        CONTEXT,
        n=2,
        max_tokens=4,
        max_tokens_param="max_tokens",
        prompt_param="prompt",
        speculation=True,
        tpot_target_s=tpot_target_s,
    )
    return [request.tpot_target_s for request in plan.requests]


def test_every_choice_has_the_target_of_its_call_or_else_the_configured_one() -> None:
    assert targets_of(None) == [None, None]
    assert targets_of(0.02) == [0.02, 0.02]
    assert targets_of(None, default_tpot_target_s=0.05) == [0.05, 0.05]
    assert targets_of(0.02, default_tpot_target_s=0.05) == [0.02, 0.02]
