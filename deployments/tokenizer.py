"""Text to token ids and back, from a local model folder; never from the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import blake3
import jinja2
import tokenizers

from deployments.errors import RequestInvalidError
from deployments.token_bytes import TokenBytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from deployments.engine.config import EngineConfig


class ChatTurn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class Vocabulary:
    """What token ids mean: all that target and draft replicas need of a tokenizer.

    Thread-safe: the fast tokenizers hold no state between calls.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # Not how many there are: ids may have gaps.
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def vocab_digest(self) -> str:
        """Hex digest of the id -> token mapping; equal where ids mean the same text."""
        digest = blake3.blake3()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        for token, token_id in sorted(vocabulary.items(), key=lambda item: item[1]):
            digest.update(f"{token_id}\0{token}\0".encode())
        return digest.hexdigest(length=16)

    def to_json(self) -> str:
        """The tokenizer as a ``tokenizer.json``."""
        text: str = self._backend.to_str()
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; broken UTF-8 becomes U+FFFD."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text


class Tokenizer(Vocabulary):
    """One model's tokenizer, with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer.backend_tokenizer)
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(self._backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer files of a folder in Hugging Face layout.

        Raises:
            OSError: the folder holds no tokenizer.
        """
        # Imported late: it brings torch and takes more than a second; simulated engines need none.
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens the model expects around it."""
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def encode_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word as a text begins with it, and as it stands behind a space."""
        bare = [word.lstrip() for word in words]
        texts = [*bare, *(f" {word}" for word in bare)]
        encoded = self._backend.encode_batch(texts, add_special_tokens=False)
        return tuple({tuple(encoding.ids): None for encoding in encoded if encoding.ids})

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """Token ids of a rendered conversation that ends where the assistant begins.

        Raises:
            RequestInvalidError: the model has no chat template, or its template refuses the turns.
        """
        if not self.has_chat_template:
            raise RequestInvalidError(
                "This model has no chat template; use /v1/completions instead.", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                tokenize=False,
                add_generation_prompt=True,
            )
        except jinja2.TemplateError as error:
            raise RequestInvalidError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        # The template writes the special tokens itself; adding them again would double the BOS.
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text's UTF-8; see ``TokenBytes``."""
        return self._token_bytes.of(token_id)


def load_vocabulary(engine: EngineConfig, folder: Path) -> Vocabulary:
    """The vocabulary of the model in a folder, for a target or a draft replica.

    A simulated engine takes ``tokenizer.json`` as it is, in a tenth of a second rather than two or
    three. A real one takes what transformers makes of all the tokenizer's files, for that is what
    the ingress encodes with.

    Raises:
        OSError: the folder holds no tokenizer.
    """
    file = folder / "tokenizer.json"
    if engine.kind == "simulated" and file.is_file():
        return Vocabulary(tokenizers.Tokenizer.from_file(str(file)))
    return Tokenizer.load(folder)
