"""What a call's engine requests carry."""

from __future__ import annotations

from types import SimpleNamespace

from deployments.call import CallContext
from deployments.config import IngressConfig
from deployments.generation import Generation
from deployments.sampling import SamplingFields

CONTEXT = CallContext(
    surface="http",
    tenant=SimpleNamespace(name="one", tenant_key=bytes(32), priority=3),
    deadline=12.0,
    traceparent="00-1",
    avoid_replicas=(),
)


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
