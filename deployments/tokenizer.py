"""Text to token ids and back, from a local model folder; never from the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import blake3
import jinja2
from transformers import AutoTokenizer

from deployments.errors import RequestInvalidError
from deployments.token_bytes import TokenBytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast


class ChatTurn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class Tokenizer:
    """One model's tokenizer. Thread-safe: the fast tokenizers hold no state between calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._token_bytes = TokenBytes(self._backend)
        self.vocab_size: int = len(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer files of a folder in Hugging Face layout.

        Raises:
            OSError: the folder holds no tokenizer.
        """
        return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._tokenizer.chat_template)

    def vocab_digest(self) -> str:
        """Hex digest of the id -> token mapping; equal where ids mean the same text."""
        digest = blake3.blake3()
        for token, token_id in sorted(
            self._tokenizer.get_vocab().items(), key=lambda item: item[1]
        ):
            digest.update(f"{token_id}\0{token}\0".encode())
        return digest.hexdigest(length=16)

    def to_json(self) -> str:
        """The tokenizer as a ``tokenizer.json``."""
        text: str = self._backend.to_str()
        return text

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

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; broken UTF-8 becomes U+FFFD."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text's UTF-8; see ``TokenBytes``."""
        return self._token_bytes.of(token_id)
