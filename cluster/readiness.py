"""Waiting for a deployed application, with a word on what is still missing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import httpx

from cluster.errors import ClusterStartError
from cluster.signals import check_stop_requested

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_S = 0.3
_PROBE_TIMEOUT_S = 2.0


def wait_until_ready(
    app_name: str, health_url: str, *, timeout_s: float, on_progress: Callable[[str], None]
) -> None:
    """Return once all replicas run and the proxy lets requests through.

    Args:
        app_name: the Serve application.
        health_url: answers 200 when the proxy knows a replica.
        timeout_s: seconds, at most.
        on_progress: told which deployments are still starting, whenever that changes.

    Raises:
        ClusterStartError: a replica failed for good, or the time is over.
        StopRequestedError: a stop signal came.
    """
    deadline = time.monotonic() + timeout_s
    said = ""
    while True:
        failure, waiting = _look(app_name)
        check_stop_requested()
        if failure:
            raise ClusterStartError(failure)
        if not waiting and not _answers(health_url):
            waiting = "the HTTP proxy"
        if not waiting:
            return
        if waiting != said:
            on_progress(f"waiting for {waiting}")
            said = waiting
        if time.monotonic() >= deadline:
            raise ClusterStartError(f"not ready after {timeout_s:.0f} s: waiting for {waiting}")
        time.sleep(_POLL_S)


def _look(app_name: str) -> tuple[str, str]:
    """(why it failed for good, what is still missing); both empty when all runs."""
    from ray import serve

    app = serve.status().applications.get(app_name)
    if app is None:
        return "", "the application"
    if app.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
        reasons = [d.message for d in app.deployments.values() if d.message] or [app.message]
        return "replicas do not start: " + "\n".join(reasons), ""
    missing = [
        f"{name} ({_running(deployment.replica_states)} running)"
        for name, deployment in sorted(app.deployments.items())
        if deployment.status != "HEALTHY"
    ]
    if not missing and app.status != "RUNNING":
        return "", "the application"
    return "", ", ".join(missing)


def _running(replica_states: dict[str, int]) -> str:
    return f"{replica_states.get('RUNNING', 0)} of {sum(replica_states.values())}"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=_PROBE_TIMEOUT_S).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
