"""What a client asks for, as a grammar of the library that matches tokens against it.

Library: llguidance. Everything it refuses is the client's fault and is told in its own words.
"""

from __future__ import annotations

import json

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from deployments.engine.errors import RequestRejectedError
from deployments.engine.types import StructuredOutput, StructureKind

_ANY_OBJECT = '{"type": "object"}'
_JSON_WHITESPACE = r"\n?[ ]{0,20}"
"""Enough for every usual layout. A weak model may write white space for ever where it may."""
_MAX_MESSAGE_CHARS = 300


def grammar_of(structure: StructuredOutput) -> str:
    """The grammar in the library's own form; whether it makes sense shows when it is compiled.

    Raises:
        RequestRejectedError: the text cannot be read.
    """
    try:
        return _grammar_of(structure)
    except (ValueError, TypeError, GbnfToLarkError) as error:
        raise rejected(structure, str(error)) from error
    except RecursionError as error:
        raise rejected(structure, "it is nested too deeply") from error


def rejected(structure: StructuredOutput, reason: str) -> RequestRejectedError:
    """The error of a structure that cannot be used."""
    # The first line says what is wrong; the lines behind it draw where.
    reason = reason.strip().partition("\n")[0][:_MAX_MESSAGE_CHARS].rstrip(". ")
    return RequestRejectedError(
        f"Invalid {structure.kind.value} in '{structure.param}': {reason}.", structure.param
    )


def _grammar_of(structure: StructuredOutput) -> str:
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return _json_grammar(structure.text)
        case StructureKind.JSON_OBJECT:
            return _json_grammar(_ANY_OBJECT)
        case StructureKind.REGEX:
            # Digits, words and spaces are ASCII: nobody means Thai digits by \d.
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(structure.text, 'dws')}/")
        case StructureKind.CHOICE:
            choices = json.loads(structure.text)
            if not choices:
                raise ValueError("there is nothing to choose from")
            rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
            return LLMatcher.grammar_from_lark(f"start: {rule}")
        case StructureKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(any_to_lark(structure.text))


def _json_grammar(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": _JSON_WHITESPACE}
    )
