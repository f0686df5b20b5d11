from __future__ import annotations

import asyncio
from threading import Event, Thread

import pytest

from deployments.engine.base import Engine
from deployments.engine.errors import EngineDeadError
from deployments.engine.training.answers import AnswerLog, AnswersEndedError, Question, regenerate
from deployments.engine.training.errors import RunMismatchError
from deployments.engine.types import EngineStats, FinishReason, TokenDelta

QUESTIONS = [Question((i, i + 1), 0.8 * (i % 2)) for i in range(12)]


class Repeater(Engine):
    """Answers with the prompt and the seed's last digits, in two deltas; notes all requests."""

    def __init__(self, dies_at=None):
        self.requests = []
        self.num_running = self.most_running = 0
        self._dies_at = dies_at

    async def generate(self, request):
        self.requests.append(request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            for token_ids in (request.prompt_token_ids, (request.sampling.seed % 97,)):
                await asyncio.sleep(0)
                if len(self.requests) == self._dies_at:
                    raise EngineDeadError("gone")
                yield TokenDelta(
                    request_id=request.request_id,
                    token_ids=token_ids,
                    finish_reason=FinishReason.STOP,
                )
        finally:
            self.num_running -= 1

    def abort(self, request_id):
        raise NotImplementedError

    def stats(self):
        return EngineStats()

    def check_health(self):
        return

    async def drain(self, timeout_s):
        return

    async def close(self):
        return


def ask(engine, log, num_concurrent=3, progress=lambda _: None):
    return regenerate(
        engine,
        QUESTIONS,
        log,
        max_tokens=9,
        seed=5,
        num_concurrent=num_concurrent,
        progress=progress,
    )


def opened(folder, fingerprint="one"):
    return AnswerLog(folder / "work" / "answers.jsonl", fingerprint=fingerprint)


async def test_every_question_is_answered_once(tmp_path):
    engine, lines = Repeater(), []
    log = opened(tmp_path)
    await ask(engine, log, progress=lines.append)
    assert len(engine.requests) == len(log.answers) == len(QUESTIONS)
    assert all(
        log.answers[i][:2] == question.prompt_token_ids for i, question in enumerate(QUESTIONS)
    )
    assert engine.most_running == 3
    by_prompt = {request.prompt_token_ids: request.sampling for request in engine.requests}
    assert [by_prompt[q.prompt_token_ids].temperature for q in QUESTIONS] == [0.0, 0.8] * 6
    assert {sampling.max_tokens for sampling in by_prompt.values()} == {9}
    assert len({sampling.seed for sampling in by_prompt.values()}) == len(QUESTIONS)
    assert lines[-1].startswith("answers: 12 of 12")


async def test_interrupted_work_asks_only_for_what_is_missing(tmp_path):
    whole, cut = opened(tmp_path / "a"), opened(tmp_path / "b")
    await ask(Repeater(), whole)
    with pytest.raises(EngineDeadError):
        await ask(Repeater(dies_at=8), cut)
    assert 0 < len(cut.answers) < len(QUESTIONS)
    again, engine = opened(tmp_path / "b"), Repeater()
    assert again.answers == cut.answers
    await ask(engine, again)
    assert len(engine.requests) == len(QUESTIONS) - len(cut.answers)
    assert again.answers == whole.answers == opened(tmp_path / "b").answers


async def test_an_error_leaves_nothing_running(tmp_path):
    engine = Repeater(dies_at=5)
    with pytest.raises(EngineDeadError):
        await ask(engine, opened(tmp_path))
    assert engine.num_running == 0


def test_half_a_line_is_cut_off(tmp_path):
    opened(tmp_path).append(4, [1, 2])
    path = tmp_path / "work" / "answers.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        path.write_bytes(whole + whole[:size].splitlines()[-1][:9])
        log = opened(tmp_path)
        assert log.answers == {4: (1, 2)}
        log.append(5, [3])
        assert opened(tmp_path).answers == {4: (1, 2), 5: (3,)}


def test_a_file_that_ends_in_its_header_begins_anew(tmp_path):
    opened(tmp_path)
    path = tmp_path / "work" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert opened(tmp_path).answers == {}
    assert opened(tmp_path).answers == {}


@pytest.mark.parametrize("line", ["{}", "3", '{"index": 1}', "no JSON"])
def test_a_damaged_file_is_refused(tmp_path, line):
    opened(tmp_path)
    with (tmp_path / "work" / "answers.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunMismatchError, match="cannot be read"):
        opened(tmp_path)


def test_answers_to_something_else_are_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(RunMismatchError, match="another target"):
        opened(tmp_path, fingerprint="two")


def test_whoever_waits_for_an_answer_gets_it_when_it_is_written(tmp_path):
    log = opened(tmp_path)
    waiter = Thread(target=lambda: log.wait_for([3, 5]))
    waiter.start()
    log.append(3, [1, 2])
    log.append(4, [1])
    assert waiter.is_alive()
    log.append(5, [])
    waiter.join(30)
    assert not waiter.is_alive()


def test_whoever_waits_hears_that_no_answers_come(tmp_path):
    log, closed = opened(tmp_path), Event()
    closed.set()
    with pytest.raises(AnswersEndedError):
        log.wait_for([0], closed=closed)
    log.end(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError, match="gone"):
        log.wait_for([0])


def test_a_log_of_another_process_is_read_on_by_whole_lines(tmp_path):
    log = opened(tmp_path)
    log.append(0, [7, 8])
    path = tmp_path / "work" / "answers.jsonl"
    with path.open("ab") as file:
        file.write(b'{"index": 1, "token_')
    other = AnswerLog(path, fingerprint="one", is_mine=False)
    assert other.answers == {0: (7, 8)}
    assert path.read_bytes().endswith(b'"token_')
    with path.open("ab") as file:
        file.write(b'ids": [9], "seconds": 0.5}\n')
    other.wait_for([1])
    assert other.answers == {0: (7, 8), 1: (9,)}
    # Its own writer cuts a half line off.
    with path.open("ab") as file:
        file.write(b"{")
    assert AnswerLog(path, fingerprint="one").answers == other.answers
    assert path.read_bytes().endswith(b"}\n")
