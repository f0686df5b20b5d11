"""A language model small enough to predict by hand, and what engines are tested with around it.

The fake model keeps (token, position) in its KV rows and hashes every row it may see into its
logits. One wrong slot, position, mask or stale row changes the text, and since all its arithmetic
is on integers the text is the same on every machine and for every batch shape.
"""

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.engine.speculation.noise import gumbel, row_key
from deployments.engine.speculation.speculator import NOTHING_ELSE, Speculator, TakenDraft
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from deployments.engine.torch_engine.assembly import EngineParts
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.model_runner import FeatureOutput
from deployments.engine.torch_engine.rotary import RopeConfig
from deployments.engine.torch_engine.sampling_math import process_logits
from deployments.engine.types import FinishReason, GenerationRequest, SamplingParams
from kv_store.keys import EXACT
from kv_store.layout import PageLayout
from kv_store.page_store import LoadedPages, PageStore, PageStoreStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.torch_engine.forward_batch import ForwardBatch

VOCAB_SIZE = 64
EOS = 63
MODEL_CONFIG = ModelConfig(
    model_type="fake",
    hidden_size=2,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=2,
    vocab_size=VOCAB_SIZE,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_positions=4096,
    eos_token_ids=(EOS,),
)
LAYOUT = PageLayout(
    num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32", model_digest="fake", rope="none"
)
_PIECES = [bytes([97 + i % 26]) for i in range(60)] + [b"\xe2\x82", b"\xac", b"\xf0\x9f", b""]


def detokenize(token_ids: Sequence[int]) -> str:
    """Letters, and three tokens that are parts of characters."""
    return b"".join(_PIECES[token] for token in token_ids).decode(errors="replace")


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _row_hashes(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    pairs = tokens.astype(np.uint64) * np.uint64(1_000_003) + positions.astype(np.uint64)
    return _mix(pairs + np.uint64(0x9E3779B97F4A7C15))


def _logits(state: np.uint64) -> np.ndarray:
    """[V] float32, multiples of 2**-20, so that float32 and float64 agree to the bit."""
    bits = _mix(state + np.arange(1, VOCAB_SIZE + 1, dtype=np.uint64) * np.uint64(0x9E3779B9))
    return ((bits >> np.uint64(41)).astype(np.float64) * 2.0**-20 - 4.0).astype(np.float32)


def logits_after(token_ids: Sequence[int]) -> np.ndarray:
    """What the fake model says behind a text, computed without pages or batches."""
    tokens = np.asarray(token_ids)
    hashes = _row_hashes(tokens, np.arange(len(tokens)))
    return _logits(hashes.sum(dtype=np.uint64))


class FakeRunner:
    """The fake model behind the runner protocol."""

    def __init__(self, memory: KVCache) -> None:
        self.memory = memory
        self.num_forwards = 0
        self.batch_sizes: list[int] = []
        self.crash_at: int | None = None
        self.nan_after_token: int | None = None
        self.before_forward = lambda: None

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self.before_forward()
        self.num_forwards += 1
        self.batch_sizes.append(len(batch.token_ids))
        if self.crash_at is not None and self.num_forwards >= self.crash_at:
            raise ArithmeticError("the device is gone")
        assert batch.slots.unique().numel() == batch.slots.numel(), "two rows share a slot"
        keys, values = self.memory.k[0, :, 0], self.memory.v[0, :, 0]
        keys[batch.slots] = torch.stack((batch.token_ids, batch.positions), dim=1).float()
        values[batch.slots, 0] = (batch.token_ids + 7 * batch.positions).float()
        row_logits = np.empty((len(batch.token_ids), VOCAB_SIZE), dtype=np.float32)
        for span in batch.spans:
            assert torch.equal(
                span.kv_slots[-span.length :], batch.slots[span.start : span.start + span.length]
            )
            rows = keys[span.kv_slots].numpy()
            checks = values[span.kv_slots, 0].numpy()
            assert np.array_equal(checks, rows[:, 0] + 7 * rows[:, 1]), "keys and values differ"
            hashes = _row_hashes(rows[:, 0], rows[:, 1])
            total = len(hashes)
            for q in range(span.length):
                seen = np.ones(total, dtype=bool)
                if span.tail_mask is None:
                    seen[total - span.length + q + 1 :] = False
                else:
                    seen[total - span.tail_mask.shape[1] :] = span.tail_mask[q].numpy()
                row_logits[span.start + q] = _logits(hashes[seen].sum(dtype=np.uint64))
        if self.nan_after_token is not None:
            poisoned = (batch.token_ids == self.nan_after_token).numpy()
            row_logits[poisoned, 5] = np.nan
        return torch.from_numpy(row_logits[batch.logit_rows.numpy()])

    def forward_with_features(
        self, batch: ForwardBatch, capture_layers: tuple[int, ...]
    ) -> FeatureOutput:
        """Features of layer i: (1000 * i + token, position) of each row."""
        rows = torch.stack((batch.token_ids, batch.positions), dim=1).float()
        features = tuple(rows + torch.tensor([1000.0 * i, 0.0]) for i in capture_layers)
        return FeatureOutput(self.forward(batch), features)


@dataclass(frozen=True)
class Expected:
    """What a request must give; without a finish reason it ends in an error."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_match: str | int | None = None


def expected(
    request: GenerationRequest, max_model_len: int = 4096, form: Form | None = None
) -> Expected:
    """Generate the plainest way there is: one token at a time, everything computed from scratch."""
    form = form or Form()
    sampling = request.sampling
    prompt = list(request.prompt_token_ids)
    output: list[int] = []
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    limit = min(sampling.max_tokens, max_model_len - len(prompt))
    while True:
        banned = _banned(request, output) | form.forbidden(output)
        if form.can_end(output):
            banned -= stops & {EOS}
        token = _choose(request, prompt, output, stops, banned)
        if token is None:
            return Expected(tuple(output), FinishReason.STOP if form.can_end(output) else None)
        text_before = form.detokenize(output)
        output.append(token)
        if len(output) >= sampling.min_tokens:
            if token in stops:
                return Expected(tuple(output), FinishReason.STOP, token)
            text = form.detokenize(output)
            ends = [
                (text.find(s, max(0, len(text_before) - len(s) + 1)), -len(s), s)
                for s in sampling.stop_strings
            ]
            found = [end for end in ends if end[0] >= 0]
            if found:
                return Expected(tuple(output), FinishReason.STOP, min(found)[2])
        if form.is_whole(output):
            return Expected(tuple(output), FinishReason.STOP)
        if len(output) >= limit:
            return Expected(tuple(output), FinishReason.LENGTH)


class Form:
    """What an output may look like; this one allows everything."""

    detokenize = staticmethod(detokenize)

    def forbidden(self, output: list[int]) -> set[int]:
        """Tokens that may not follow; the end of text is one of them, or none is."""
        return set()

    def can_end(self, output: list[int]) -> bool:
        """Whether it may end here because of its form."""
        return False

    def is_whole(self, output: list[int]) -> bool:
        """Whether nothing can follow."""
        return False


def _banned(request: GenerationRequest, output: list[int]) -> set[int]:
    return {
        bad[-1]
        for bad in request.sampling.bad_token_sequences
        if output[len(output) - len(bad) + 1 :] == list(bad[:-1]) or len(bad) == 1
    }


def _choose(
    request: GenerationRequest,
    prompt: list[int],
    output: list[int],
    stops: set[int],
    banned: set[int],
) -> int | None:
    sampling = request.sampling
    scores = logits_after(prompt + output).astype(np.float64)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in set(prompt + output):
        if scores[token] > 0:
            scores[token] /= sampling.repetition_penalty
        else:
            scores[token] *= sampling.repetition_penalty
    for token in set(output):
        scores[token] -= sampling.frequency_penalty * output.count(token)
        scores[token] -= sampling.presence_penalty
    if len(output) < sampling.min_tokens:
        scores[list(stops)] = -np.inf
    scores[list(banned)] = -np.inf
    if np.isneginf(scores).all():
        return None
    if sampling.temperature == 0:
        return int(scores.argmax())
    processed = process_logits(
        torch.from_numpy(scores).unsqueeze(0),
        [sampling.temperature],
        [sampling.top_k],
        [sampling.top_p],
        [sampling.min_p],
    )
    key = row_key(sampling.seed, request.choice_index, len(prompt) + len(output))
    return int((processed + gumbel([key], torch.arange(VOCAB_SIZE))).argmax())


class CheckedSpeculator(Speculator):
    """Drafts by a rule, and checks that the engine keeps the speculator's contract."""

    def __init__(self) -> None:
        self.sessions: dict[int, list[int]] = {}
        self.closed: set[int] = set()
        self.is_shut_down = False
        self.num_accepted = 0
        self._phase = "idle"
        self._round: dict[int, DraftTree] = {}

    def draft(self, session_id: int, token_ids: list[int], max_draft_tokens: int) -> DraftTree:
        raise NotImplementedError

    def open(self, session):
        assert session.session_id not in self.sessions
        assert session.session_id not in self.closed
        self.sessions[session.session_id] = list(session.token_ids)

    def take(self, requests, load=NOTHING_ELSE):
        assert self._phase == "idle"
        assert load.num_rows >= load.num_tokens >= 0
        self._phase = "taken"
        taken = []
        for request in requests:
            known = self.sessions[request.session_id]
            assert list(request.token_ids) == known
            tree = self.draft(request.session_id, known, request.max_draft_tokens)
            taken.append(TakenDraft(tree=tree, table_hit=bool(len(tree))))
        return taken

    def verifying(self, rounds):
        assert self._phase == "taken"
        self._phase = "verifying"
        self._round = {request.session_id: tree for request, tree in rounds}
        for request, tree in rounds:
            assert len(tree) <= max(0, request.max_draft_tokens)

    def verified(self, results):
        assert self._phase == "verifying"
        self._phase = "idle"
        for result in results:
            assert self._round[result.session_id] == result.tree
            assert list(result.nodes) == sorted(set(result.nodes))
            assert all(node < len(result.tree) for node in result.nodes)
            self.num_accepted += len(result.nodes)
            self.sessions[result.session_id] += result.new_token_ids

    def close(self, session_id):
        self.sessions.pop(session_id, None)
        self.closed.add(session_id)

    def shutdown(self):
        self.is_shut_down = True


class OracleSpeculator(CheckedSpeculator):
    """Foresees greedy text: always right at temperature 0 without penalties."""

    shift = 0

    def draft(self, session_id, token_ids, max_draft_tokens):
        text = list(token_ids)
        for _ in range(max_draft_tokens):
            text.append(int(logits_after(text).argmax()) + self.shift)
            text[-1] %= VOCAB_SIZE
        return DraftTree.chain(text[len(token_ids) :], DraftOrigin.POOL)


class WrongSpeculator(OracleSpeculator):
    """Always wrong, where the oracle is always right."""

    shift = 1


class HostileSpeculator(CheckedSpeculator):
    """Random trees over likely tokens, some of them malformed, overlong or out of range."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)  # noqa: S311

    def draft(self, session_id, token_ids, max_draft_tokens):
        rng = self._rng
        num_nodes = rng.randint(0, max_draft_tokens + 3)
        tokens: list[int] = []
        parents: list[int] = []
        texts: list[list[int]] = []
        for node in range(num_nodes):
            parent = rng.randint(-1, node - 1)
            text = list(token_ids) if parent < 0 else texts[parent]
            order = np.argsort(-logits_after(text))
            tokens.append(int(order[rng.choice((0, 0, 0, 1, 2))]))
            parents.append(parent)
            texts.append([*text, tokens[-1]])
        if num_nodes and rng.random() < 0.1:
            tokens[rng.randrange(num_nodes)] = rng.choice((-1, VOCAB_SIZE, 10**9))
        if num_nodes and rng.random() < 0.1:
            parents[rng.randrange(num_nodes)] = rng.choice((-2, num_nodes, num_nodes + 5))
        if num_nodes and rng.random() < 0.1:
            parents.pop()
        return DraftTree(tuple(tokens), tuple(parents), (DraftOrigin.POOL,) * len(tokens))


def _write(page, rows):
    rows[:] = page.reshape(rows.shape)


@dataclass
class FakePageStore(PageStore):
    """A tier in a dict whose answers a test can hold back, cut, spoil or fail."""

    pages: dict = field(default_factory=dict)
    answer: str = "at once"
    pending: list = field(default_factory=list)
    num_saves: int = 0
    is_closed: bool = False
    page_nbytes: int = LAYOUT.nbytes

    @property
    def fidelity(self):
        return EXACT

    def load(self, keys, *, timeout_s, into=None, traceparent=None):
        future: Future[LoadedPages] = Future()
        found = []
        for key in keys:
            if key not in self.pages:
                break
            found.append(self.pages[key].copy())
        if self.answer == "short":
            found = found[:1]
        elif self.answer == "spoilt":
            found = [*found[:1], *(page[:-4] for page in found[1:])]
        if self.answer == "error":
            future.set_exception(OSError("the tier broke its promise"))
        elif self.answer == "held":
            self.pending.append((future, found, into))
        else:
            self._land(future, found, into)
        return future

    def _land(self, future, found, into):
        """As the real store does: a page whose place was taken back ends the answer."""
        pages = []
        for page, landing in zip(found, into or repeat(None), strict=False):
            if landing is not None and page.nbytes == self.page_nbytes:
                page = landing.fill(partial(_write, page))
            if page is None:
                break
            pages.append(page)
        future.set_result(LoadedPages(tuple(pages), ("fake",) * len(pages)))

    def release_loads(self):
        """Answer every load that was held back."""
        for future, found, into in self.pending:
            if future.set_running_or_notify_cancel():
                self._land(future, found, into)
        self.pending.clear()

    def save(self, key, page, *, traceparent=None):
        assert page.nbytes == self.page_nbytes
        self.pages[key] = page
        self.num_saves += 1
        return True

    def stats(self):
        return PageStoreStats(num_saved=len(self.pages))

    def find(self, keys, *, timeout_s):
        future: Future[int] = Future()
        held = [key in self.pages for key in keys]
        future.set_result([*held, False].index(False))
        return future

    def settle(self, keys, *, timeout_s):
        return self.find(keys, timeout_s=timeout_s)

    def clear(self, namespace_id, *, timeout_s):
        raise NotImplementedError

    def wait_until_written(self, timeout_s):
        return True

    def flush(self, timeout_s):
        return True

    def close(self):
        self.is_closed = True


def make_config(**changes) -> TorchEngineConfig:
    num_draft_tokens = changes.pop("num_draft_tokens", 4)
    defaults = {
        "num_pages": 32,
        "max_num_seqs": 8,
        "max_batch_tokens": 128,
        "max_model_len": 1024,
        "speculation": SpeculationConfig(num_draft_tokens=num_draft_tokens),
    }
    return TorchEngineConfig(**(defaults | changes))


def make_parts(
    config: TorchEngineConfig, speculator: Speculator, store: PageStore | None = None
) -> EngineParts:
    memory = KVCache(MODEL_CONFIG, config.num_pages, dtype=torch.float32)
    return EngineParts(
        runner=FakeRunner(memory),
        memory=memory,
        layout=LAYOUT,
        vocab_size=VOCAB_SIZE,
        max_positions=MODEL_CONFIG.max_positions,
        eos_token_ids=frozenset(MODEL_CONFIG.eos_token_ids),
        store=store,
        speculator=speculator,
        detokenize=detokenize,
    )


def make_request(
    request_id: str = "r", prompt: Sequence[int] | None = None, **changes
) -> GenerationRequest:
    """A greedy request; sampling fields and request fields may be changed by name."""
    fields = {"max_tokens": 20, "seed": 7, "temperature": 0.0, "ignore_eos": True}
    request_fields = {}
    for name, value in changes.items():
        is_sampling = name in SamplingParams.__slots__
        (fields if is_sampling else request_fields)[name] = value
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt if prompt is not None else (3, 1, 4, 1, 5)),
        sampling=SamplingParams(**fields),
        **request_fields,
    )
