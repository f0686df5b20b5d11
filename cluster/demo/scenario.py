"""What the demo does with a running cluster, and what it measures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.demo import prompts
from cluster.errors import ClusterError
from cluster.hot_tier import cluster_valkey
from cluster.kv_usage import valkey_usage
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.demo.clients import Answer, DemoClients
    from cluster.state import ClusterState

_SEED = 20_261
_TEMPERATURE = 0.8
_MAX_TOKENS = 64
_MIN_SHARED_TOKENS = 512
_WRITE_BACK_TIMEOUT_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where the demo shows what it does.

    Attributes:
        step: told what comes next.
        text: gets generated text as it arrives.
    """

    step: Callable[[str], None]
    text: Callable[[str], None]


def run_scenario(clients: DemoClients, state: ClusterState, terminal: Terminal) -> dict[str, Any]:
    """Put all prompts through the cluster.

    Returns:
        The report, but for what only the stopped cluster can tell.
    """
    report: dict[str, Any] = {"model": state.model}
    warm_up(clients, terminal)
    report |= ask_both_surfaces(clients, terminal)
    report["speculation"] = compare_speculation(clients, terminal)
    report |= share_pages(clients, state, terminal)
    return report


def warm_up(clients: DemoClients, terminal: Terminal) -> None:
    """One short request to each target replica, so that no later one pays for a first call."""
    terminal.step("a first request to each target replica")
    first = clients.over_http(prompts.GREETING, temperature=0, seed=0, max_tokens=4)
    clients.over_http(
        prompts.GREETING, temperature=0, seed=0, max_tokens=4, avoid_replica=first.replica
    )


def ask_both_surfaces(clients: DemoClients, terminal: Terminal) -> dict[str, Any]:
    """The same question, seed and temperature over HTTP and over gRPC."""
    answers: dict[str, Answer] = {}
    for name, ask in (("http", clients.over_http), ("grpc", clients.over_grpc)):
        terminal.step(f"over {name}: {prompts.GREETING}")
        answers[name] = ask(
            prompts.GREETING,
            temperature=_TEMPERATURE,
            seed=_SEED,
            max_tokens=_MAX_TOKENS,
            on_text=terminal.text,
        )
        terminal.text("\n")
    surfaces: dict[str, Any] = {
        name: {"text": answer.text, "tokens": answer.num_tokens, "replica": answer.replica}
        for name, answer in answers.items()
    }
    surfaces["identical"] = answers["http"].text == answers["grpc"].text
    return surfaces


def compare_speculation(clients: DemoClients, terminal: Terminal) -> dict[str, Any]:
    """The same prompts with and without speculation, greedy and sampled."""
    pairs: list[tuple[Answer, Answer]] = []
    for prompt in prompts.PAIRED:
        for temperature in (0.0, _TEMPERATURE):
            terminal.step(f"with and without speculation, temperature {temperature}: {prompt}")
            on, off = (
                clients.over_http(
                    prompt,
                    temperature=temperature,
                    seed=_SEED,
                    max_tokens=_MAX_TOKENS,
                    speculation=speculation,
                    on_text=terminal.text if speculation else lambda text: None,
                )
                for speculation in (True, False)
            )
            terminal.text("\n")
            pairs.append((on, off))

    def total(name: str) -> int:
        return sum(int(on.speculation.get(name, 0)) for on, _ in pairs)

    steps = total("num_spec_steps")
    return {
        "on_equals_off": all(on.text == off.text for on, off in pairs),
        "pairs": len(pairs),
        "spec_steps": steps,
        "draft_tokens": total("num_draft_tokens"),
        "accepted_tokens": total("num_accepted_draft_tokens"),
        "pool_accepted_tokens": total("num_accepted_pool_tokens"),
        "table_hits": total("num_table_hits"),
        "table_misses": total("num_table_misses"),
        "mean_acceptance_length": 1 + total("num_accepted_draft_tokens") / steps if steps else 1.0,
        "tokens_per_s_on": _tokens_per_s([on for on, _ in pairs]),
        "tokens_per_s_off": _tokens_per_s([off for _, off in pairs]),
    }


def share_pages(clients: DemoClients, state: ClusterState, terminal: Terminal) -> dict[str, Any]:
    """A long prompt at one replica, then at the other one, which has never seen it."""
    valkey = cluster_valkey(Path(state.run_dir))
    if valkey is None:
        raise ClusterError("the demo's cluster has no Valkey")
    prompt = f"{prompts.DOCUMENT}\n{prompts.DOCUMENT_QUESTION}"
    before = valkey_usage(valkey).num_pages
    terminal.step("a long prompt, new to the whole cluster")
    first = clients.over_http(prompt, temperature=0, seed=0, max_tokens=32, on_text=terminal.text)
    terminal.text("\n")
    terminal.step(f"replica {first.replica} writes its pages to the tier")
    wanted = before + _MIN_SHARED_TOKENS // PAGE_TOKENS
    deadline = time.monotonic() + _WRITE_BACK_TIMEOUT_S
    while valkey_usage(valkey).num_pages < wanted and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    terminal.step(f"the same prompt at another replica than {first.replica}")
    second = clients.over_http(
        prompt,
        temperature=0,
        seed=0,
        max_tokens=32,
        avoid_replica=first.replica,
        on_text=terminal.text,
    )
    terminal.text("\n")
    return {
        "kv": {
            "first_replica": first.replica,
            "second_replica": second.replica,
            "first_replica_cached_tokens": first.num_cached_tokens,
            "second_replica_cached_tokens": second.num_cached_tokens,
            "same_text": first.text == second.text,
            "valkey_pages": valkey_usage(valkey).num_pages,
        },
        "ttft_ms": {"cold": _ms(first.ttft_s), "warm": _ms(second.ttft_s)},
    }


def _tokens_per_s(answers: list[Answer]) -> float:
    return round(sum(a.num_tokens for a in answers) / sum(a.duration_s for a in answers), 2)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
