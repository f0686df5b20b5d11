"""Structures from the request to the engine thread: errors, aborts, the cache, the bounds."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace

import pytest

from deployments.engine.errors import EngineDeadError, EngineOverloadedError, RequestRejectedError
from deployments.engine.torch_engine.assembly import start_engine
from deployments.engine.torch_engine.structure import compiler as compiler_module
from deployments.engine.types import FinishReason, StructuredOutput, StructureKind
from tests.fakes_async import eventually
from tests.fakes_engine import OracleSpeculator, expected, make_config, make_parts, make_request
from tests.fakes_structure import (
    PARTS,
    GrammarForm,
    choice,
    detokenize,
    grammar,
    regex,
    schema,
    tokenizer_json,
)

DIGITS = regex("[0-9]{12}")


class Tokenizer:
    """Hands out its JSON when a test lets it."""

    def __init__(self):
        self.num_calls = 0
        self.is_asked = threading.Event()
        self.go_on = threading.Event()

    def __call__(self):
        self.num_calls += 1
        self.is_asked.set()
        assert self.go_on.wait(20)
        return tokenizer_json()


@pytest.fixture
async def tokenizer_and_engine():
    tokenizer = Tokenizer()
    tokenizer.go_on.set()
    config = make_config()
    parts = make_parts(config, OracleSpeculator())
    engine = start_engine(config, replace(parts, **PARTS | {"tokenizer_json": tokenizer}))
    yield tokenizer, engine
    await engine.close()


async def collect(engine, request):
    return [delta async for delta in engine.generate(request)]


def text(deltas):
    return tuple(token for delta in deltas for token in delta.token_ids)


async def test_choices_of_one_structure_are_independent(tokenizer_and_engine):
    tokenizer, engine = tokenizer_and_engine
    requests = [
        make_request(f"r{i}", structure=DIGITS, temperature=1.0, choice_index=i) for i in range(6)
    ]
    answers = await asyncio.gather(*(collect(engine, request) for request in requests))
    form = GrammarForm(DIGITS)
    assert [text(deltas) for deltas in answers] == [
        expected(request, form=form).token_ids for request in requests
    ]
    assert len({text(deltas) for deltas in answers}) == 6
    assert tokenizer.num_calls == 1


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (schema({"type": "cat"}), "Invalid json_schema in 'structured_outputs': Invalid type"),
        (schema({"not": {"type": "null"}}), "Unimplemented keys"),
        (schema({"type": "array", "minItems": 3, "maxItems": 1}), "Unsatisfiable"),
        (schema({"$ref": "http://localhost/x.json"}), "does not fetch"),
        (StructuredOutput(kind=StructureKind.JSON_SCHEMA, text="{"), "EOF"),
        (regex("["), "regex parse error"),
        (regex(r"a(?=b)"), "look-around|regex parse error"),
        (grammar("start: nowhere"), "unknown name"),
        (grammar("root ::= ("), "Expected"),
        (grammar("root ::= " + "(" * 30_000 + ")" * 30_000), "nested too deeply"),
        (grammar("start: " + "(" * 30_000 + ")" * 30_000), "Invalid grammar"),
        (regex("(" * 30_000 + ")" * 30_000), "Invalid regex"),
        (StructuredOutput(kind=StructureKind.JSON_SCHEMA, text='{"items":' * 999), "recursion"),
        (choice(), "nothing to choose from"),
        (StructuredOutput(kind=StructureKind.CHOICE, text="7", param="guess"), "'guess'"),
    ],
)
async def test_wrong_structures_are_refused_in_words(tokenizer_and_engine, structure, message):
    _, engine = tokenizer_and_engine
    with pytest.raises(RequestRejectedError, match=message) as caught:
        await collect(engine, make_request(structure=structure))
    assert caught.value.param == structure.param
    assert len(str(caught.value)) < 500
    # The id is free again, and nothing has been queued.
    assert engine.stats().num_steps == 0
    assert text(await collect(engine, make_request()))


async def test_an_engine_without_a_tokenizer_says_so():
    config = make_config()
    engine = start_engine(config, make_parts(config, OracleSpeculator()))
    try:
        with pytest.raises(RequestRejectedError, match="no tokenizer"):
            await collect(engine, make_request(structure=DIGITS))
    finally:
        await engine.close()


async def test_others_go_on_while_a_structure_is_compiled(tokenizer_and_engine):
    tokenizer, engine = tokenizer_and_engine
    tokenizer.go_on.clear()
    slow = asyncio.create_task(collect(engine, make_request("slow", structure=DIGITS)))
    await eventually(tokenizer.is_asked.is_set)
    assert text(await collect(engine, make_request("quick")))
    assert not slow.done()
    tokenizer.go_on.set()
    assert len(detokenize(text(await slow))) == 12


async def test_abort_while_a_structure_is_compiled(tokenizer_and_engine):
    tokenizer, engine = tokenizer_and_engine
    tokenizer.go_on.clear()
    task = asyncio.create_task(
        collect(engine, make_request(structure=regex("[0-9]+"), max_tokens=900))
    )
    await eventually(tokenizer.is_asked.is_set)
    engine.abort("r")
    tokenizer.go_on.set()
    deltas = await task
    assert deltas[-1].finish_reason is FinishReason.ABORT
    assert len(text(deltas)) < 900


async def test_close_while_a_structure_is_compiled(tokenizer_and_engine):
    tokenizer, engine = tokenizer_and_engine
    tokenizer.go_on.clear()
    task = asyncio.create_task(collect(engine, make_request(structure=DIGITS)))
    await eventually(tokenizer.is_asked.is_set)
    closing = asyncio.create_task(engine.close())
    tokenizer.go_on.set()
    await closing
    with pytest.raises(EngineDeadError):
        await task


async def test_close_while_structures_wait_to_be_compiled(tokenizer_and_engine):
    tokenizer, engine = tokenizer_and_engine
    tokenizer.go_on.clear()
    tasks = [
        asyncio.create_task(collect(engine, make_request(f"r{i}", structure=DIGITS)))
        for i in range(4)
    ]
    await eventually(tokenizer.is_asked.is_set)
    closing = asyncio.create_task(engine.close())
    await eventually(lambda: sum(task.done() for task in tasks) == 2)
    tokenizer.go_on.set()
    await closing
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {EngineDeadError}


async def test_a_crowd_of_structures_is_refused(tokenizer_and_engine, monkeypatch):
    tokenizer, engine = tokenizer_and_engine
    monkeypatch.setattr(compiler_module, "_MAX_PENDING", 3)
    tokenizer.go_on.clear()
    requests = [make_request(f"r{i}", structure=DIGITS) for i in range(5)]
    tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
    await eventually(lambda: sum(task.done() for task in tasks) == 2)
    tokenizer.go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, EngineOverloadedError) for result in results) == 2
    assert sum(isinstance(result, list) for result in results) == 3


async def test_a_structure_that_is_not_ready_in_time_is_refused(tokenizer_and_engine, monkeypatch):
    tokenizer, engine = tokenizer_and_engine
    monkeypatch.setattr(compiler_module, "_TIMEOUT_S", 0.01)
    tokenizer.go_on.clear()
    with pytest.raises(EngineOverloadedError, match="in time"):
        await collect(engine, make_request(structure=DIGITS))
    tokenizer.go_on.set()


async def test_only_the_last_structures_are_remembered(tokenizer_and_engine, monkeypatch):
    _, engine = tokenizer_and_engine
    monkeypatch.setattr(compiler_module, "_MAX_COMPILED", 2)
    compiled = []
    monkeypatch.setattr(
        compiler_module, "grammar_of", lambda s: compiled.append(s.text) or f"start: /{s.text}/"
    )
    for name in ("a{3}", "b{3}", "a{3}", "c{3}", "a{3}", "b{3}"):
        await collect(engine, make_request(structure=regex(name)))
    assert compiled == ["a{3}", "b{3}", "c{3}", "b{3}"]


def test_a_choice_is_written_as_it_is():
    form = GrammarForm(choice('a"b\\', "€\n", ""))
    assert form.can_end([])
    assert json.loads(choice('a"b\\', "€\n", "").text) == ['a"b\\', "€\n", ""]
