"""A tokenizer for the fake model that can write JSON, and an oracle of what a grammar allows.

The oracle asks the grammar library in the plainest way: its matcher only ever goes forwards.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deployments.engine.torch_engine.structure.grammar import grammar_of
from deployments.engine.types import StructuredOutput, StructureKind
from tests.fakes_engine import EOS, VOCAB_SIZE, Form

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEXTS = [
    *'{}[]":,-. \n0123456789abcdefghlnrstux',
    '{"', '":', '", "', 'a"', '"]', "true", "false", "null", "ab", "abc", "12", "]}", "  ", "x\n",
]  # fmt: skip
PIECES = [text.encode() for text in _TEXTS] + [b"\xe2", b"\x82", b"\xac"]
PIECES += [bytes([0x41 + i]) for i in range(EOS - len(PIECES))]
assert len(PIECES) == EOS == VOCAB_SIZE - 1


def detokenize(token_ids: Sequence[int]) -> str:
    return b"".join(PIECES[token] for token in token_ids if token < EOS).decode(errors="replace")


def tokenizer_json() -> str:
    """The tokens as a byte-level BPE without merges."""
    # The printable characters that stand for bytes, in the order of the bytes they stand for.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = [c for c in alphabet if ord(c) < 256]
    hidden = [c for c in alphabet if ord(c) >= 256]
    of_byte = {ord(c): c for c in shown}
    of_byte |= dict(zip([b for b in range(256) if b not in of_byte], hidden, strict=True))
    vocabulary = {"".join(of_byte[byte] for byte in piece): i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<eos>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer.to_str()


PARTS = {"tokenizer_json": tokenizer_json, "detokenize": detokenize}
"""What an engine of this tokenizer has in other places than the fake one."""


class GrammarForm(Form):
    """The oracle of one structure."""

    detokenize = staticmethod(detokenize)

    def __init__(self, structure: StructuredOutput) -> None:
        tokenizer = LLTokenizer(tokenizer_json(), n_vocab=VOCAB_SIZE, eos_token=EOS)
        self._start = LLMatcher(tokenizer, grammar_of(structure), log_level=0)
        assert not self._start.is_error(), self._start.get_error()
        self._output: list[int] = []
        self._matcher = self._start.deep_copy()

    def _behind(self, output: list[int]) -> LLMatcher:
        if self._output != output[: len(self._output)]:
            self._output, self._matcher = [], self._start.deep_copy()
        new = output[len(self._output) :]
        assert self._matcher.try_consume_tokens(new) == len(new)
        self._output = list(output)
        return self._matcher

    def forbidden(self, output: list[int]) -> set[int]:
        bits = int.from_bytes(self._behind(output).compute_bitmask(), "little")
        return {EOS} | {token for token in range(EOS) if not bits >> token & 1}

    def can_end(self, output: list[int]) -> bool:
        return self._behind(output).is_accepting()

    def is_whole(self, output: list[int]) -> bool:
        if EOS in output:
            return False
        return self.can_end(output) and len(self.forbidden(output)) == VOCAB_SIZE


def schema(content: dict) -> StructuredOutput:
    return StructuredOutput(kind=StructureKind.JSON_SCHEMA, text=json.dumps(content))


def regex(text: str) -> StructuredOutput:
    return StructuredOutput(kind=StructureKind.REGEX, text=text)


def choice(*texts: str) -> StructuredOutput:
    return StructuredOutput(kind=StructureKind.CHOICE, text=json.dumps(texts))


def grammar(text: str) -> StructuredOutput:
    return StructuredOutput(kind=StructureKind.GRAMMAR, text=text)


ANY_OBJECT = StructuredOutput(kind=StructureKind.JSON_OBJECT, text="")
