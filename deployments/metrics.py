"""Every metric's name, unit and labels. Ray exports them on its Prometheus endpoint.

Ray prefixes the names with ``ray_``; Serve adds the labels ``deployment``, ``replica`` and
``application``. Layers below return snapshots (``EngineStats``, ``PageStoreStats``,
``SpeculatorStats``, ``DraftServerStats``); ``target_metrics`` and ``draft_metrics`` report them.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

from ray.serve import metrics

if TYPE_CHECKING:
    from deployments.engine.types import GenerationUsage

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.75, 2.5)


class Metric(NamedTuple):
    """One metric's definition; a histogram has boundaries."""

    name: str
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


TTFT = Metric(
    "paceline_time_to_first_token_seconds",
    "From the request's arrival to its first token, at the ingress.",
    ("surface", "tenant"),
    _SECONDS,
)
INTER_TOKEN = Metric(
    "paceline_time_per_output_token_seconds",
    "Mean time per output token behind the first one, per choice, at the ingress.",
    ("surface", "tenant"),
    _TOKEN_SECONDS,
)
REQUEST_DURATION = Metric(
    "paceline_request_duration_seconds",
    "From the request's arrival to its end, at the ingress.",
    ("surface", "tenant"),
    _SECONDS,
)
REQUESTS = Metric(
    "paceline_requests_total", "Requests ended, by outcome.", ("surface", "tenant", "outcome")
)
ERRORS = Metric("paceline_errors_total", "Requests refused or failed.", ("surface", "error"))
PROMPT_TOKENS = Metric("paceline_prompt_tokens_total", "Prompt tokens served.", ("tenant",))
OUTPUT_TOKENS = Metric("paceline_output_tokens_total", "Output tokens delivered.", ("tenant",))
CACHED_TOKENS = Metric(
    "paceline_cached_tokens_total",
    "Prompt tokens whose KV was not computed again, by where it came from.",
    ("tenant", "source"),
)
IN_FLIGHT = Metric("paceline_requests_in_flight", "Requests in flight at this ingress replica.")
RESUMES = Metric("paceline_resumes_total", "Sequences moved to another target replica.")
DRAFT_TOKENS = Metric(
    "paceline_draft_tokens_total", "Draft tokens verified, by drafter.", ("origin",)
)
WITHHELD_TOKENS = Metric(
    "paceline_withheld_draft_tokens_total",
    "Draft tokens at hand that were not verified, by reason: it would not have paid (cost), or a "
    "sequence would have missed its time per output token (target).",
    ("reason",),
)
TPOT_TARGETS = Metric(
    "paceline_tpot_target_steps_total",
    "Targets for the time per output token, counted in every step, by what the step was expected "
    "to do to them.",
    ("result",),
)
ACCEPTED_TOKENS = Metric(
    "paceline_accepted_draft_tokens_total", "Draft tokens accepted, by drafter.", ("origin",)
)
SPEC_STEPS = Metric("paceline_spec_steps_total", "Verification steps that carried a draft.")
SPEC_STEP_TIME = Metric(
    "paceline_spec_step_seconds_total",
    "What steps took (taken), and what steps without drafts would have taken for as many tokens "
    "(plain); their ratio is what drafts are worth.",
    ("steps",),
)
TABLE_LOOKUPS = Metric(
    "paceline_outcome_table_lookups_total",
    "Steps for which the draft pool was asked, by whether a row fitted.",
    ("result",),
)
RUNNING = Metric("paceline_engine_running_sequences", "Sequences decoding in this engine.")
WAITING = Metric("paceline_engine_waiting_sequences", "Sequences queued in this engine.")
PREEMPTIONS = Metric("paceline_engine_preemptions_total", "Sequences put back for lack of pages.")
RECOMPUTED = Metric(
    "paceline_engine_recomputed_tokens_total", "Tokens computed again because of preemptions."
)
STEPS = Metric("paceline_engine_steps_total", "Engine steps.")
STEP_TIME = Metric("paceline_engine_step_seconds", "Moving average of one engine step.")
PAGES = Metric("paceline_kv_pages", "KV pages of this replica, by state.", ("state",))
TIER_PAGES = Metric("paceline_kv_tier_pages_total", "Pages by tier and outcome.", ("tier", "event"))
STORE_QUEUE = Metric("paceline_kv_write_queue_pages", "Pages waiting to be written to the tier.")
LOADS_REFUSED = Metric(
    "paceline_kv_loads_refused_total",
    "Loads from the tier answered empty at once because too many were pending.",
)
SINGLE_FLIGHTS = Metric(
    "paceline_kv_single_flights_total",
    "Waits for pages that another replica was computing, by whether they came.",
    ("result",),
)
DRAFT_SESSIONS = Metric("paceline_draft_sessions", "Sequences that hold a draft replica.")
OUTCOME_TABLES = Metric(
    "paceline_outcome_tables_total",
    "Tables that reached this target replica, by whether the next round had begun.",
    ("result",),
)
ROUND_TRIP = Metric(
    "paceline_draft_round_trip_seconds",
    "Median time from a commit to its table, at the target.",
)
SPECULATION_STALL = Metric(
    "paceline_speculation_stall_seconds",
    "Median time that drafts add to a step of SGLang, outside forward and choice of tokens.",
)
DRAFT_LINKS = Metric("paceline_draft_links", "Streams of this target replica that are up.")
LINKED_SESSIONS = Metric(
    "paceline_draft_linked_sessions",
    "Sequences that a draft replica drafts for over such a stream.",
)
SPECULATOR_EVENTS = Metric(
    "paceline_speculator_events_total",
    "What went wrong between this target replica and its drafters.",
    ("event",),
)
DRAFT_STREAMS = Metric("paceline_draft_server_streams", "Target replicas at this draft replica.")
DRAFT_SERVER_SESSIONS = Metric(
    "paceline_draft_server_sessions", "Sequences that this draft replica drafts for."
)
DRAFT_PENDING = Metric(
    "paceline_draft_server_pending_sessions", "Sequences that wait for a table here."
)
DRAFT_BATCH_TIME = Metric(
    "paceline_draft_server_batch_seconds", "Moving average of one call of the drafter."
)
DRAFT_BATCHES = Metric("paceline_draft_server_batches_total", "Calls of the drafter.")
DRAFT_TABLES = Metric("paceline_draft_server_tables_total", "Tables made.")
DRAFT_ROWS = Metric("paceline_draft_server_rows_total", "Rows of these tables.")
DRAFT_SERVER_EVENTS = Metric(
    "paceline_draft_server_events_total", "What this draft replica had to put up with.", ("event",)
)
DRAFT_DROPS = Metric(
    "paceline_draft_server_dropped_sessions_total",
    "Sequences this draft replica let go of before their end, by reason.",
    ("reason",),
)

DRAFT_SCORED_ROUNDS = Metric(
    "paceline_draft_scored_rounds_total",
    "Rounds whose tables were scored by the text that followed, by drafter (stable, candidate).",
    ("drafter",),
)
DRAFT_CONFIRMED = Metric(
    "paceline_draft_confirmed_tokens_total",
    "Draft tokens of these tables that were in time and right, used or not.",
    ("drafter",),
)
DRAFT_TRIALS = Metric(
    "paceline_draft_trials_total",
    "Candidates that a draft replica has judged, by outcome (promoted, rolled_back).",
    ("outcome",),
)
DRAFT_TRIAL = Metric(
    "paceline_draft_trial_running", "Whether a candidate drafts for a share of the sessions here."
)
TRAFFIC_LOG = Metric(
    "paceline_traffic_log_prompts_total",
    "Prompts of tenants that consented, by what became of them (kept, dropped).",
    ("result",),
)

PREFILL_PROMPTS = Metric(
    "paceline_prefill_prompts_total",
    "Prompts at a target replica that has a prefill pool, by whether they went there (sent) or why "
    "not (short, cached, unused, busy, failing, cost).",
    ("reason",),
)
PREFILL_CALLS = Metric(
    "paceline_prefill_calls_total",
    "Prompts sent to the prefill pool, by what came of it: pages to load (loadable), or none "
    "that were not there before (in_vain), timeout, overloaded, lost, failed, cancelled.",
    ("outcome",),
)
PREFILL_SECONDS = Metric(
    "paceline_prefill_seconds",
    "How long a target replica waited for the prefill pool, by what came of it.",
    ("outcome",),
    _SECONDS,
)
PREFILL_TOKENS = Metric(
    "paceline_prefill_tokens_total", "Prompt tokens that the prefill pool computed for targets."
)
PREFILL_IN_FLIGHT = Metric(
    "paceline_prefill_in_flight", "Prompts of this target replica at the prefill pool."
)
PREFILL_TOKEN_COST = Metric(
    "paceline_prefill_token_cost_seconds",
    "What a prompt token has cost of late, by where it came from: computed here, by the pool, or "
    "loaded; 0 while unknown.",
    ("place",),
)

SCALING_REPLICAS = Metric(
    "paceline_autoscaling_replicas", "Replicas that the autoscaling policy decided on.", ("pool",)
)
SCALING_NEEDS = Metric(
    "paceline_autoscaling_need_replicas",
    "Replicas that a pool needs by each of its signals, not rounded; 0 for one that has no say.",
    ("pool", "cause"),
)
SCALING_DECISIONS = Metric(
    "paceline_autoscaling_decisions_total",
    "Decisions of the autoscaling policy, by the signal that counted and by direction (up, down, "
    "keep).",
    ("pool", "cause", "direction"),
)

ALL_METRICS: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)


def new_counter(metric: Metric) -> metrics.Counter:
    """A counter of this process."""
    return metrics.Counter(metric.name, metric.description, metric.labels)


def new_gauge(metric: Metric) -> metrics.Gauge:
    """A gauge of this process."""
    return metrics.Gauge(metric.name, metric.description, metric.labels)


def new_histogram(metric: Metric) -> metrics.Histogram:
    """A histogram of this process."""
    return metrics.Histogram(
        metric.name, metric.description, list(metric.boundaries), metric.labels
    )


class TotalFeed:
    """Feeds a counter from a total that only grows."""

    def __init__(self, counter: metrics.Counter, tags: dict[str, str] | None = None) -> None:
        self._counter = counter
        self._tags = tags
        self._seen = 0.0

    def update(self, total: float) -> None:
        """Add what came since the last call."""
        if total > self._seen:
            self._counter.inc(total - self._seen, tags=self._tags)
            self._seen = total


class LabelledFeeds:
    """One ``TotalFeed`` for each value of a counter's labels."""

    def __init__(self, metric: Metric) -> None:
        self._counter = new_counter(metric)
        self._labels = metric.labels
        self._feeds: dict[tuple[str, ...], TotalFeed] = {}

    def update(self, *values: str, total: float) -> None:
        """Add what came since the last call for these values, in the order of the labels."""
        if values not in self._feeds:
            tags = dict(zip(self._labels, values, strict=True))
            self._feeds[values] = TotalFeed(self._counter, tags)
        self._feeds[values].update(total)


class IngressMetrics:
    """What the ingress measures."""

    def __init__(self) -> None:
        self.ttft = new_histogram(TTFT)
        self.inter_token = new_histogram(INTER_TOKEN)
        self.duration = new_histogram(REQUEST_DURATION)
        self.requests = new_counter(REQUESTS)
        self.errors = new_counter(ERRORS)
        self.prompt_tokens = new_counter(PROMPT_TOKENS)
        self.output_tokens = new_counter(OUTPUT_TOKENS)
        self.cached_tokens = new_counter(CACHED_TOKENS)
        self.in_flight = new_gauge(IN_FLIGHT)
        self._resumes = new_counter(RESUMES)
        self._traffic_log = new_counter(TRAFFIC_LOG)
        self._num_in_flight = 0

    def observe(self, surface: str, tenant: str) -> RequestObserver:
        """Start the clock of one request."""
        self._num_in_flight += 1
        # Once the request is on its way: a gauge takes longer than most of what is done for it.
        asyncio.get_running_loop().call_soon(self._write_in_flight)
        return RequestObserver(self, surface, tenant)

    def released(self) -> None:
        """One request less in flight."""
        self._num_in_flight -= 1
        self._write_in_flight()

    def _write_in_flight(self) -> None:
        self.in_flight.set(self._num_in_flight)

    def resumed(self) -> None:
        """A sequence went on at another replica."""
        self._resumes.inc()

    def logged(self, result: str) -> None:
        """A prompt of a tenant that consented was kept or dropped."""
        self._traffic_log.inc(tags={"result": result})

    def error(self, surface: str, error: BaseException) -> None:
        """A request ended in an error, before or after its first token."""
        self.errors.inc(tags={"surface": surface, "error": type(error).__name__})


class RequestObserver:
    """The times and counts of one request, from arrival to end."""

    def __init__(self, metrics_: IngressMetrics, surface: str, tenant: str) -> None:
        self._metrics = metrics_
        self._labels = {"surface": surface, "tenant": tenant}
        self._started = time.perf_counter()
        self._first: dict[int, float] = {}
        self._last: dict[int, tuple[float, int]] = {}
        self._outcome = "cancelled"
        self._usage: GenerationUsage | None = None

    def tokens(self, index: int, num_tokens: int) -> None:
        """Choice ``index`` got new tokens."""
        if not num_tokens:
            return
        now = time.perf_counter()
        if index not in self._first:
            # A first step may bring several tokens; only those behind it have a gap to measure.
            self._first[index] = now
            self._last[index] = (now, 0)
        else:
            self._last[index] = (now, self._last[index][1] + num_tokens)

    def finished(self, usage: GenerationUsage) -> None:
        """All choices ended."""
        self._outcome = "finished"
        self._usage = usage

    def failed(self) -> None:
        """The request ended in an error."""
        self._outcome = "failed"

    def close(self) -> None:
        """The request has ended, however it did.

        Its metrics are written when the event loop comes round again: they take longer than all
        else that its last words have to wait for.
        """
        elapsed = time.perf_counter() - self._started
        asyncio.get_running_loop().call_soon(self._write, elapsed)

    def _write(self, elapsed: float) -> None:
        if self._first:
            first = min(self._first.values())
            self._metrics.ttft.observe(first - self._started, tags=self._labels)
        self._metrics.duration.observe(elapsed, tags=self._labels)
        for index, (last, count) in self._last.items():
            if count:
                gap = (last - self._first[index]) / count
                self._metrics.inter_token.observe(gap, tags=self._labels)
        self._metrics.requests.inc(tags={**self._labels, "outcome": self._outcome})
        if self._usage is not None:
            self._write_usage(self._usage)
        self._metrics.released()

    def _write_usage(self, usage: GenerationUsage) -> None:
        tenant = {"tenant": self._labels["tenant"]}
        if usage.num_prompt_tokens:
            self._metrics.prompt_tokens.inc(usage.num_prompt_tokens, tags=tenant)
        if usage.num_output_tokens:
            self._metrics.output_tokens.inc(usage.num_output_tokens, tags=tenant)
        local = usage.num_cached_tokens - usage.num_tier_cached_tokens
        for source, count in (("replica", local), ("tier", usage.num_tier_cached_tokens)):
            if count > 0:
                self._metrics.cached_tokens.inc(count, tags={**tenant, "source": source})
