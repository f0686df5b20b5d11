"""What must hold of the demo's report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Report = dict[str, Any]

EXPECTATIONS: dict[str, Callable[[Report], bool]] = {
    "http.text is not empty": lambda r: bool(r["http"]["text"]),
    "grpc.text is not empty": lambda r: bool(r["grpc"]["text"]),
    "identical": lambda r: r["identical"] is True,
    "speculation.on_equals_off": lambda r: r["speculation"]["on_equals_off"] is True,
    "speculation.pool_accepted_tokens > 0": lambda r: r["speculation"]["pool_accepted_tokens"] > 0,
    "speculation.table_hits > 0": lambda r: r["speculation"]["table_hits"] > 0,
    "speculation.mean_acceptance_length > 1": (
        lambda r: r["speculation"]["mean_acceptance_length"] > 1
    ),
    "kv.first_replica != kv.second_replica": (
        lambda r: r["kv"]["first_replica"] != r["kv"]["second_replica"]
    ),
    "kv.second_replica_cached_tokens >= 512": (
        lambda r: r["kv"]["second_replica_cached_tokens"] >= 512
    ),
    "kv.same_text": lambda r: r["kv"]["same_text"] is True,
    "kv.valkey_pages > 0": lambda r: r["kv"]["valkey_pages"] > 0,
    "kv.ssd_pages > 0": lambda r: r["kv"]["ssd_pages"] > 0,
    "ttft_ms.cold > ttft_ms.warm": lambda r: r["ttft_ms"]["cold"] > r["ttft_ms"]["warm"],
    "processes_left == 0": lambda r: r["processes_left"] == 0,
}
"""A sentence about the report -> whether it holds."""


def broken_expectations(report: Report) -> list[str]:
    """Those that do not hold."""
    return [name for name, holds in EXPECTATIONS.items() if not holds(report)]
