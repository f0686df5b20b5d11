"""Structured outputs have their form and are those of plain decoding, whatever is drafted."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
from llguidance import LLParserLimits

from deployments.engine.errors import RequestRejectedError
from deployments.engine.torch_engine.structure import compiler as compiler_module
from deployments.engine.types import FinishReason
from tests.fakes_engine import (
    EOS,
    OracleSpeculator,
    WrongSpeculator,
    expected,
    make_config,
    make_request,
)
from tests.fakes_structure import (
    ANY_OBJECT,
    PARTS,
    PIECES,
    GrammarForm,
    choice,
    detokenize,
    grammar,
    regex,
    schema,
)
from tests.unit.deployments.engine.torch_engine.test_core_text import Session, speculator_for

RECORD = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 5},
        "ab": {"type": "integer", "minimum": -5, "maximum": 300},
        "rest": {"type": "array", "items": {"enum": ["a", True, None]}, "maxItems": 3},
        "u": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/pair"}]},
    },
    "required": ["a", "ab", "rest", "u"],
    "additionalProperties": False,
    "$defs": {
        "pair": {
            "type": "array",
            "prefixItems": [{"type": "null"}, {"type": "string", "pattern": "^[a-c]{2}$"}],
            "items": False,
            "minItems": 2,
        }
    },
}
FORMS = {
    "record": schema(RECORD),
    "any object": ANY_OBJECT,
    "number": schema({"type": "number"}),
    "regex": regex(r"(ab|[c-f]\d+)*x?€{0,2}"),
    "anchored": regex(r"^\d{3}-[a-c]+$"),
    "choice": choice("a", "ab", "abc, x", 'a"b,', "€\n"),
    "grammar": grammar('start: "[" start "]" | "x" | start "," start'),
    "gbnf": grammar('root ::= "a" root "b" | "12"'),
}


class MixedSpeculator(OracleSpeculator):
    """Drafts that a grammar allows often, seldom, or not at all."""

    def __init__(self, seed):
        super().__init__()
        self._rng = random.Random(seed)  # noqa: S311
        self.truth: dict[int, tuple[int, ...]] = {}
        self.num_prompt_tokens = 0

    def draft(self, session_id, token_ids, max_draft_tokens):
        tree = super().draft(session_id, token_ids, max_draft_tokens)
        output = token_ids[self.num_prompt_tokens :]
        coming = list(self.truth.get(session_id, ())[len(output) :][:max_draft_tokens])
        if coming and self._rng.random() < 0.5:
            coming[self._rng.randrange(len(coming))] = self._rng.randrange(EOS + 1)
        if not coming:
            return tree
        return tree.chain(coming, "pool")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["none", "oracle", "wrong", "hostile", "mixed"])
def test_structured_text_is_that_of_plain_decoding(name, kind):
    rng = random.Random(f"{name} {kind}")  # noqa: S311
    form = GrammarForm(FORMS[name])
    speculator = MixedSpeculator(name) if kind == "mixed" else speculator_for(kind, 5)
    session = Session(make_config(num_pages=7, num_draft_tokens=6), speculator, **PARTS)
    requests, wants = {}, {}
    for session_id in range(1, 5):
        prompt = [session_id] * rng.choice((1, 60, 130))
        changes = {"bad_token_sequences": ((PIECES.index(b"a"), PIECES.index(b'"')),)}
        request = make_request(
            f"r{session_id}",
            prompt,
            structure=FORMS[name],
            max_tokens=rng.choice((3, 40, 70)),
            temperature=session_id % 2,
            seed=session_id,
            ignore_eos=rng.random() < 0.4,
            min_tokens=rng.choice((0, 0, 3)),
            stop_strings=rng.choice(((), (), ("12", "x"))),
            frequency_penalty=rng.choice((0.0, 0.5)),
            top_p=rng.choice((1.0, 0.5)),
            **(changes if rng.random() < 0.3 else {}),
        )
        requests[session_id] = request
        wants[session_id] = expected(request, form=form)
    if kind == "mixed":
        speculator.truth = {i: want.token_ids for i, want in wants.items()}
    for session_id, request in requests.items():
        speculator.num_prompt_tokens = len(request.prompt_token_ids)
        session.add(session_id, request)
        session.run()
    for session_id, want in wants.items():
        end = session.ends[session_id]
        assert tuple(session.tokens[session_id]) == want.token_ids
        if want.finish_reason is None:
            assert isinstance(end, RequestRejectedError)
        else:
            assert (end.finish_reason, end.stop_match) == (want.finish_reason, want.stop_match)
    if kind == "mixed":
        assert speculator.num_accepted > 0
    session.assert_all_free()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_finished_output_has_its_form(temperature):
    session = Session(**PARTS)
    for number in range(20):
        name = ("record", "regex", "choice")[number % 3]
        request = make_request(
            f"r{number}",
            [number],
            structure=FORMS[name],
            max_tokens=400,
            temperature=temperature,
            seed=number,
            ignore_eos=False,
        )
        session.add(number + 1, request)
    session.run()
    for number in range(20):
        text = detokenize(session.tokens[number + 1])
        assert session.ends[number + 1].finish_reason is FinishReason.STOP
        if number % 3 == 0:
            jsonschema.validate(json.loads(text), RECORD)
        elif number % 3 == 1:
            assert re.fullmatch(FORMS["regex"].text, text)
        else:
            assert text in json.loads(FORMS["choice"].text)


def test_a_whole_text_ends_without_another_step():
    request = make_request(structure=choice("abc"), max_tokens=20, speculation=False)
    session = Session(**PARTS)
    session.add(1, request)
    session.run()
    assert detokenize(session.tokens[1]) == "abc"
    end = session.ends[1]
    assert (end.finish_reason, end.stop_match) == (FinishReason.STOP, None)
    assert session.core.stats().num_steps == len(session.tokens[1])


@pytest.mark.parametrize("kind", ["none", "oracle", "wrong", "hostile"])
def test_tokens_that_are_certain_are_drafted(kind):
    request = make_request(structure=choice("beard" * 8), max_tokens=50)
    session = Session(make_config(num_draft_tokens=4), speculator_for(kind, 1), **PARTS)
    session.add(1, request)
    session.run()
    assert detokenize(session.tokens[1]) == "beard" * 8
    assert (
        tuple(session.tokens[1])
        == expected(request, form=GrammarForm(request.sampling.structure)).token_ids
    )
    stats = session.core.stats()
    # The prefill gives one token, and every step behind it a whole draft and its bonus.
    assert stats.num_steps == 1 + -(-(len(session.tokens[1]) - 1) // 5)
    assert stats.speculation.num_accepted_draft_tokens == stats.speculation.num_draft_tokens
    assert stats.speculation.num_accepted_pool_tokens == 0


def test_an_empty_text_may_be_whole():
    session = Session(**PARTS)
    session.add(1, make_request(structure=choice(""), ignore_eos=True))
    session.run()
    assert session.tokens[1] == []
    assert session.ends[1].finish_reason is FinishReason.STOP
    session.assert_all_free()


@pytest.mark.parametrize("kind", ["none", "oracle", "hostile"])
def test_an_output_that_cannot_go_on_ends_in_an_error(kind):
    bad = ((PIECES.index(b"a"),), (PIECES.index(b"ab"),))
    stuck = make_request(structure=choice("xab"), bad_token_sequences=bad)
    session = Session(speculator=speculator_for(kind, 3), **PARTS)
    session.add(1, stuck)
    session.add(2, make_request(max_tokens=30))
    session.run()
    assert detokenize(session.tokens[1]) == "x"
    error = session.ends[1]
    assert isinstance(error, RequestRejectedError)
    assert error.param == "structured_outputs"
    assert tuple(session.tokens[2]) == expected(make_request(max_tokens=30)).token_ids
    session.assert_all_free()


def test_a_text_that_no_token_continues_ends_in_an_error():
    session = Session(speculator=OracleSpeculator(), **PARTS)
    session.add(1, make_request(structure=choice("aé")))
    session.run()
    assert detokenize(session.tokens[1]) == "a"
    assert "no token fits" in str(session.ends[1])
    session.assert_all_free()


@pytest.mark.parametrize("kind", ["none", "oracle", "hostile"])
def test_a_grammar_that_outgrows_its_bounds_ends_in_an_error(kind, monkeypatch):
    limits = LLParserLimits(step_max_items=25, verbose_errors=False)
    monkeypatch.setattr(compiler_module, "_LIMITS", limits)
    session = Session(speculator=speculator_for(kind, 3), **PARTS)
    session.add(1, make_request(structure=FORMS["record"], max_tokens=200))
    session.run()
    assert isinstance(session.ends[1], RequestRejectedError)
    assert "Too many items" in str(session.ends[1])
    session.assert_all_free()


def test_bad_words_that_leave_nothing_end_in_an_error():
    session = Session(speculator=OracleSpeculator())
    session.add(1, make_request(bad_token_sequences=tuple((token,) for token in range(EOS + 1))))
    session.run()
    assert isinstance(session.ends[1], RequestRejectedError)
    assert session.ends[1].param == "bad_words"


@pytest.mark.parametrize("num_resumed", [0, 1, 7, 15])
def test_a_resumed_output_keeps_its_form(num_resumed):
    request = make_request(
        structure=FORMS["record"], max_tokens=300, temperature=1.0, ignore_eos=False
    )
    want = expected(request, form=GrammarForm(FORMS["record"]))
    session = Session(speculator=WrongSpeculator(), **PARTS)
    session.add(1, replace(request, resumed_output_ids=want.token_ids[:num_resumed]))
    session.add(2, replace(request, resumed_output_ids=want.token_ids))
    session.run()
    assert tuple(session.tokens[1]) == want.token_ids[num_resumed:]
    assert session.tokens[2] == []
    for session_id in (1, 2):
        assert session.ends[session_id].finish_reason is FinishReason.STOP


def test_a_resumed_output_of_another_form_ends_in_an_error():
    request = make_request(structure=choice("abc"), resumed_output_ids=(PIECES.index(b"x"),))
    session = Session(**PARTS)
    session.add(1, request)
    session.run()
    assert isinstance(session.ends[1], RequestRejectedError)


def test_preemption_does_not_change_a_structured_text():
    session = Session(make_config(num_pages=5, max_num_seqs=4), OracleSpeculator(), **PARTS)
    form = GrammarForm(ANY_OBJECT)
    requests = {
        i: make_request(f"r{i}", [i] * 60, structure=ANY_OBJECT, max_tokens=120, temperature=1.0)
        for i in range(1, 4)
    }
    for session_id, request in requests.items():
        session.add(session_id, request)
    session.run()
    assert session.core.stats().num_preemptions > 0
    for session_id, request in requests.items():
        assert tuple(session.tokens[session_id]) == expected(request, form=form).token_ids
