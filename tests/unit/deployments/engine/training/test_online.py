from __future__ import annotations

import threading
import time

import pytest
import torch

from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.online import OnlineTexts, QueueClosedError, QueueStats, TextQueue
from tests.unit.deployments.engine.training.tiny_training import head_config, target, texts

SIZE = texts()[0].num_bytes


def online(max_bytes=10 * SIZE):
    capture = FeatureCapture(target(), head_config().aux_layers, max_length=64)
    return OnlineTexts(capture, [AnsweredPrompt.of(text) for text in texts()], max_bytes)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_texts_are_those_of_a_capture_in_the_order_asked():
    source = online()
    order = [3, 0, 0, 7, 11]
    streamed = list(source.stream(order))
    assert all(same(text, texts()[i]) for text, i in zip(streamed, order, strict=True))
    assert source.lengths == [text.num_tokens for text in texts()]
    assert all(same(a, b) for a, b in zip(source, texts(), strict=True))
    for text, answer in zip(texts(), source.answers(), strict=True):
        assert answer.equal(text.token_ids[1:][text.is_answer[:-1]])


def test_the_account_is_exact():
    source = online()
    taken = list(source.stream(range(12)))
    stats = source.stats
    assert stats.num_put == stats.num_taken == 12
    assert stats.num_tokens == sum(text.num_tokens for text in taken)


def test_no_more_waits_than_the_bound_allows():
    source = online(max_bytes=3 * SIZE)
    stream = source.stream(range(12))
    next(stream)
    # The first is taken; three wait, and the target holds a fifth that finds no room.
    until(lambda: source.stats.num_put == 4)
    assert len(list(stream)) == 11
    assert source.stats.most_bytes == 3 * SIZE


def test_a_text_longer_than_the_bound_passes_alone():
    source = online(max_bytes=1)
    assert len(list(source.stream(range(12)))) == 12
    assert source.stats.most_bytes == SIZE


def test_a_stream_that_is_closed_leaves_no_thread_behind():
    source = online(max_bytes=2 * SIZE)
    stream = source.stream(range(12))
    next(stream)
    until(lambda: source.stats.num_put == 3)
    stream.close()
    assert not any(thread.name == "online-features" for thread in threading.enumerate())
    assert source.stats.num_taken == 1
    # Another one begins where it is told to.
    (text,) = source.stream([5])
    assert same(text, texts()[5])


def test_what_goes_wrong_in_the_target_is_raised_in_the_training(monkeypatch):
    source = online()
    whole = source._capture.texts

    def failing(answered):
        if answered[0] is source._answered[2]:
            raise RuntimeError("out of memory")
        return whole(answered)

    monkeypatch.setattr(source._capture, "texts", failing)
    stream = source.stream(range(12))
    assert [same(next(stream), texts()[i]) for i in range(2)] == [True, True]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)


def test_nothing_is_put_into_a_closed_queue():
    queue = TextQueue(QueueStats(SIZE))
    queue.put(texts()[0])
    queue.close()
    with pytest.raises(QueueClosedError):
        queue.put(texts()[1])
