from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from deployments.errors import RequestInvalidError
from deployments.tokenizer import ChatTurn, Tokenizer, Vocabulary
from tests.fakes_tokenizer import SPECIALS, write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path / "model"))


@pytest.mark.parametrize("text", ["", "the cat", "12 345\n\n1.", "é😀 漢字", " leading"])
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_conversation_has_each_special_token_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([ChatTurn("user", "the")])
    start, end = SPECIALS.index("<|im_start|>"), SPECIALS.index("<|im_end|>")
    assert ids.count(start) == 2
    assert ids.count(end) == 1
    assert ids[0] == start
    assert tokenizer.decode(ids) == "user\nthe\nassistant\n"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "model", chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestInvalidError, match="no chat template") as caught:
        tokenizer.encode_chat([ChatTurn("user", "hi")])
    assert caught.value.param == "messages"


def test_a_template_may_refuse_a_conversation(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestInvalidError, match="no tools here"):
        tokenizer.encode_chat([ChatTurn("tool", "42")])


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        Tokenizer.load(tmp_path)


def test_the_digest_follows_the_vocabulary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    same = Tokenizer.load(write_tokenizer(tmp_path / "same"))
    path = write_tokenizer(tmp_path / "other") / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    path.write_text(json.dumps(content))
    other = Tokenizer.load(path.parent)
    assert same.vocab_digest() == tokenizer.vocab_digest()
    assert other.vocab_digest() != tokenizer.vocab_digest()


def test_the_vocabulary_ends_behind_the_last_id_also_where_ids_have_gaps() -> None:
    assert Vocabulary(Backend(WordLevel({"a": 0, "b": 1, "c": 9}, unk_token="a"))).vocab_size == 10


def test_words_are_written_at_the_beginning_and_behind_a_space(tokenizer: Tokenizer) -> None:
    the, space_the = tokenizer.encode("the"), tokenizer.encode(" the")
    assert len(the) == len(space_the) == 1
    words = tokenizer.encode_words(["the", "  the", "cat"])
    assert words[0] == tuple(the)
    assert tuple(space_the) in words
    assert tuple(tokenizer.encode(" cat")) in words
    assert len(words) == 4


def test_the_tokenizer_can_be_handed_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_text(tokenizer.to_json())
    copy = Backend.from_file(str(tmp_path / "copy.json"))
    assert copy.encode("the 12\n").ids == tokenizer.encode("the 12\n")
