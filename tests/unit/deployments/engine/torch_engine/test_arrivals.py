"""Random arrivals on a real, tiny model: every text is that of its request run alone.

Requests share prefixes, come from several tenants with several priorities, are aborted, run out of
time, are refused, preempted, and find pages of others in the pool and in the tier; drafters lie;
steps are cut anywhere. One seed makes one scenario. ``MODES`` says which arithmetic must stand it:
float32 up to what rounding can explain (``tests.exactness``), others to the bit.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from deployments.engine.errors import DeadlineExceededError, EngineOverloadedError
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from deployments.engine.torch_engine.assembly import EngineParts
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.types import FinishReason, GenerationRequest, TokenDelta
from tests.exactness import Reference, assert_same_text
from tests.fakes_engine import CheckedSpeculator, FakePageStore, make_config, make_request
from tests.unit.deployments.engine.torch_engine.test_core_text import Session
from tests.unit.deployments.engine.torch_engine.tiny_models import loaded_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VOCAB_SIZE = 97
MAX_MODEL_LEN = 256
NUM_REQUESTS = 24
NUM_SCENARIOS = 8


class Mode(NamedTuple):
    """An arithmetic, and what is demanded of it."""

    dtype: str
    is_exact: bool
    runner_options: Mapping[str, bool]


DETERMINISTIC = {"is_deterministic": True}
MODES = {
    "float32": Mode("float32", is_exact=False, runner_options={}),
    "deterministic bfloat16": Mode("bfloat16", is_exact=True, runner_options=DETERMINISTIC),
    "deterministic float32": Mode("float32", is_exact=True, runner_options=DETERMINISTIC),
}


class TinyReference(Reference):
    """The tiny model in float64."""

    def __init__(self) -> None:
        self._model = loaded_model().model.double()


@dataclass
class Bench:
    """One mode's model, requests, plain texts, and a tier that outlives scenarios."""

    mode: Mode
    requests: list[GenerationRequest]
    plain: dict[str, list[int]] = field(default_factory=dict)
    pages: dict = field(default_factory=dict)

    def session(self, config, speculator, store=None) -> Session:
        loaded = loaded_model(dtype=self.mode.dtype)
        memory = KVCache(loaded.config, config.num_pages, dtype=loaded.model.dtype)
        runner = ModelRunner(loaded.model, loaded.config, memory, **self.mode.runner_options)
        parts = EngineParts(
            runner=runner,
            memory=memory,
            layout=loaded.page_layout(),
            vocab_size=VOCAB_SIZE,
            max_positions=loaded.config.max_positions,
            eos_token_ids=frozenset(loaded.config.eos_token_ids),
            store=store,
            speculator=speculator,
            detokenize=lambda token_ids: "".join(chr(97 + token % 26) for token in token_ids),
        )
        return Session(config, speculator, parts=parts)

    def compare(self, requests, expected, actual) -> None:
        if self.mode.is_exact:
            assert {name: tuple(text) for name, text in actual.items()} == {
                name: tuple(text) for name, text in expected.items()
            }
        else:
            assert_same_text(TinyReference(), requests, expected, actual)


class HalfLiar(CheckedSpeculator):
    """Drafts random trees around the text that will come, some of them malformed or overlong."""

    def __init__(self, rng: random.Random, whole_texts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self._rng = rng
        self._whole_texts = whole_texts

    def draft(self, session_id, token_ids, max_draft_tokens):
        rng = self._rng
        whole = next((w for w in self._whole_texts if w[: len(token_ids)] == token_ids), [])
        tokens: list[int] = []
        parents: list[int] = []
        right, depth = -1, 0
        for node in range(rng.randint(0, max_draft_tokens + 2)):
            if rng.random() < 0.7 and len(token_ids) + depth < len(whole):
                tokens.append(whole[len(token_ids) + depth])
                parents.append(right)
                right, depth = node, depth + 1
            else:
                tokens.append(rng.randrange(VOCAB_SIZE))
                parents.append(rng.randint(-1, node - 1))
        if tokens and rng.random() < 0.1:
            tokens[rng.randrange(len(tokens))] = rng.choice((-1, VOCAB_SIZE, 10**9))
        if tokens and rng.random() < 0.1:
            parents[rng.randrange(len(parents))] = rng.choice((-2, len(parents)))
        return DraftTree(tuple(tokens), tuple(parents), (DraftOrigin.POOL,) * len(tokens))


def make_requests(rng: random.Random) -> list[GenerationRequest]:
    """A few beginnings, many ends; every kind of sampling."""
    shared = [rng.choices(range(3, VOCAB_SIZE), k=200) for _ in range(2)]
    requests = []
    for number in range(NUM_REQUESTS):
        length = rng.choice((1, 5, 63, 64, 65, 128, 130, 180))
        prompt = [*rng.choice(shared)[:length], *rng.choices(range(97), k=rng.choice((0, 0, 9)))]
        changes = {
            "max_tokens": rng.choice((1, 7, 25, 40, 70)),
            "seed": rng.getrandbits(64),
            "temperature": rng.choice((0.0, 0.8, 1.0)),
            "ignore_eos": rng.random() < 0.7,
        }
        if rng.random() < 0.3:
            changes |= {"top_k": rng.choice((0, 5)), "top_p": 0.9, "min_p": rng.choice((0.0, 0.02))}
        if rng.random() < 0.2:
            changes |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
        if rng.random() < 0.2:
            changes |= {"stop_strings": ("ab", "q"), "min_tokens": 4}
        requests.append(make_request(f"r{number}", prompt, **changes))
        if rng.random() < 0.3:
            requests.append(replace(requests[-1], request_id=f"r{number}b", choice_index=1))
    return requests


@pytest.fixture(scope="module", params=MODES)
def bench(request) -> Bench:
    """Texts of all requests, each alone in a plain engine with room for everything."""
    bench = Bench(MODES[request.param], make_requests(random.Random(17)))  # noqa: S311
    config = make_config(num_pages=8, max_model_len=MAX_MODEL_LEN, max_batch_tokens=256)
    for one in bench.requests:
        session = bench.session(config, NoSpeculation())
        session.add(1, replace(one, speculation=False))
        session.run()
        bench.plain[one.request_id] = session.tokens[1]
    return bench


def run_scenario(bench: Bench, seed: int) -> Counter[str]:
    """Run one; returns what happened in it."""
    rng = random.Random(seed)  # noqa: S311
    layout = loaded_model(dtype=bench.mode.dtype).page_layout()
    store = FakePageStore(pages=bench.pages, page_nbytes=layout.nbytes)
    store.answer = rng.choice(("at once", "held", "short", "error"))
    config = make_config(
        num_pages=rng.choice((4, 6, 9, 40)),
        max_model_len=MAX_MODEL_LEN,
        max_batch_tokens=rng.choice((64, 65, 100, 300)),
        max_num_seqs=rng.choice((2, 5, 12)),
        max_waiting=rng.choice((3, 40)),
        num_draft_tokens=rng.choice((1, 3, 6)),
    )
    whole_texts = [[*r.prompt_token_ids, *bench.plain[r.request_id]] for r in bench.requests]
    speculator = rng.choice((NoSpeculation, lambda: HalfLiar(rng, whole_texts)))()
    session = bench.session(config, speculator, rng.choice((None, store)))
    started: dict[int, GenerationRequest] = {}
    aborted: set[int] = set()
    for one in rng.sample(bench.requests, len(bench.requests)):
        session_id = len(started) + 1
        resumed = rng.randrange(len(bench.plain[one.request_id])) if rng.random() < 0.1 else 0
        started[session_id] = replace(
            one,
            tenant=rng.choice(("a", "b", "c")),
            tenant_key=bytes([rng.choice((0, 0, 1))]) * 32,
            priority=rng.choice((0, 0, 1)),
            deadline=session.now + rng.choice((0.05, 0.4)) if rng.random() < 0.15 else None,
            speculation=rng.random() < 0.9,
            resumed_output_ids=tuple(bench.plain[one.request_id][:resumed]),
        )
        session.add(session_id, started[session_id])
        for _ in range(rng.choice((0, 0, 1, 2, 9))):
            session.step()
            session.now += 0.01
        if rng.random() < 0.15:
            aborted.add(rng.randint(1, session_id))
            session.core.abort(max(aborted))
            session.collect()
        if rng.random() < 0.4:
            store.release_loads()
    for _ in range(len(started)):
        session.run()
        session.now += 60.0
    session.assert_all_free()
    assert set(session.ends) == set(started)
    return _judge(bench, session, started, aborted)


def _judge(bench, session, started, aborted) -> Counter[str]:
    """Compare every text, whole or in part, and count what came to pass."""
    seen: Counter[str] = Counter()
    expected, actual = {}, {}
    for session_id, request in started.items():
        end, text = session.ends[session_id], session.tokens[session_id]
        name = request.request_id
        rest = bench.plain[name][len(request.resumed_output_ids) :]
        if isinstance(end, TokenDelta) and end.finish_reason is not FinishReason.ABORT:
            seen["finished"] += 1
        else:
            rest = rest[: len(text)]
            kind = end.finish_reason.value if isinstance(end, TokenDelta) else type(end).__name__
            seen[kind] += 1
            assert isinstance(end, DeadlineExceededError | EngineOverloadedError) or (
                session_id in aborted
            )
        prefix = list(request.resumed_output_ids)
        expected[name], actual[name] = prefix + rest, prefix + text
    bench.compare(list(started.values()), expected, actual)
    stats = session.core.stats()
    seen["preemptions"] += stats.num_preemptions
    seen["local hits"] += stats.num_local_cached_tokens
    seen["tier hits"] += stats.num_tier_cached_tokens
    seen["accepted"] += stats.speculation.num_accepted_draft_tokens
    seen["rejected"] += (
        stats.speculation.num_draft_tokens - stats.speculation.num_accepted_draft_tokens
    )
    return seen


def test_text_is_that_of_the_request_alone(bench):
    seen: Counter[str] = Counter()
    for seed in range(NUM_SCENARIOS):
        print(f"scenario {seed}")  # noqa: T201 - names the scenario that failed
        seen += run_scenario(bench, seed)
    print(seen)  # noqa: T201
    # The scenarios must not lose what they are for.
    for what in ("finished", "abort", "DeadlineExceededError", "EngineOverloadedError"):
        assert seen[what] >= 5, what
    for what in ("preemptions", "local hits", "tier hits", "accepted", "rejected"):
        assert seen[what] >= 20, what
