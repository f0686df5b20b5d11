"""Writes a GGUF file's byte-level BPE vocabulary as files ``transformers`` can load.

The split into words is not derived by ``transformers`` from a GGUF file: it takes GPT-2's, where
SmolLM2 first cuts every digit off. The difference shows at whitespace before digits, so the files
are made here, with the model's own splitting.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deployments.engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.engine.torch_engine.weights.gguf import GGUFFile

_CONTROL_TOKEN = 3


def write_tokenizer_files(gguf_file: GGUFFile, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        UnsupportedModelError: the vocabulary is not SmolLM2's kind.
    """
    kind = (gguf_file.text("tokenizer.ggml.model"), gguf_file.text("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UnsupportedModelError(f"GGUF vocabularies of the kind {kind}")
    tokens = gguf_file.texts("tokenizer.ggml.tokens")
    kinds = gguf_file.numbers("tokenizer.ggml.token_type")
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    _build_tokenizer(gguf_file, tokens, special).save(str(folder / "tokenizer.json"))

    def token_of(role: str) -> str:
        return tokens[int(gguf_file.number(f"tokenizer.ggml.{role}_token_id"))]

    config = {
        # A named class would rebuild the splitting by its own rules; this one takes the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token_of("bos"),
        "eos_token": token_of("eos"),
        "pad_token": token_of("padding"),
        "unk_token": token_of("unknown"),
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(gguf_file.number("llama.context_length")),
        "chat_template": gguf_file.text("tokenizer.chat_template"),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _build_tokenizer(gguf_file: GGUFFile, tokens: list[str], special: list[str]) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [
        (left, right)
        for left, _, right in (m.partition(" ") for m in gguf_file.texts("tokenizer.ggml.merges"))
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
