"""Which files hold prompts, and what is said of those that do not."""

import json

import pytest

from cluster.errors import ConfigError
from cluster.training_prompts import builtin_prompts, read_prompts
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.fakes_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(text: str, name: str = "p.jsonl"):
        path = tmp_path / name
        path.write_text(text)
        return read_prompts(path, "CC0", tokenizer, "--prompts")

    return read


def rows(*parts: object) -> str:
    return "\n".join(json.dumps(part) for part in parts) + "\n"


def test_a_text_file_holds_one_prompt_a_line(read, tokenizer):
    source = read("why?\n\n  how?  \n", "p.txt")
    assert source.prompts == tuple(
        tuple(tokenizer.encode_chat([ChatTurn("user", text)])) for text in ("why?", "how?")
    )
    assert (source.name, source.licence) == ("p.txt", "CC0")


def test_only_newlines_end_rows(read, tokenizer):
    question = "one\u2028two\x85three"
    expected = tuple(tokenizer.encode_chat([ChatTurn("user", question)]))
    row = json.dumps({"prompt": question}, ensure_ascii=False)
    assert read(f"{row}\r\n{row}").prompts == (expected, expected)
    assert read(f"{question}\r\n", "p.txt").prompts == (expected,)


def test_the_digest_is_the_file_s(read):
    assert read("a\n", "a.txt").digest == read("a\n", "b.txt").digest != read("b\n", "c.txt").digest


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why?"},
        {"messages": [{"role": "user", "content": "why?"}]},
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
    ],
)
def test_the_usual_rows_are_read(read, tokenizer, row):
    [prompt] = read(rows(row)).prompts
    assert prompt == tuple(tokenizer.encode_chat([ChatTurn("user", "why?")]))


def test_what_stands_behind_the_last_user_message_is_not_read(read, tokenizer):
    turns = [("system", "short"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    [prompt] = read(rows({"messages": [*messages, {"role": "assistant", "content": "d"}]})).prompts
    assert prompt == tuple(tokenizer.encode_chat([ChatTurn(*turn) for turn in turns]))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("3", "not a JSON object"),
        ('{"text": "a"}', "none of 'messages'"),
        ('{"messages": []}', "no message of a user"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no message of a user"),
        ('{"messages": ["a"]}', "message 0 is not an object"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "message 0 needs"),
        (
            '{"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}]}',
            "no tools",
        ),
    ],
)
def test_a_wrong_line_is_named(read, line, problem):
    with pytest.raises(ConfigError) as refused:
        read(rows({"prompt": "fine"}) + line + "\n")
    assert "p.jsonl:2: " in str(refused.value)
    assert problem in str(refused.value)


def test_an_empty_file_and_a_missing_one_are_refused(read, tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="no prompts"):
        read("\n", "p.txt")
    with pytest.raises(ConfigError, match=r"--prompts: .*nowhere\.txt: No such file"):
        read_prompts(tmp_path / "nowhere.txt", "", tokenizer, "--prompts")
    (tmp_path / "latin.txt").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt", "", tokenizer, "--prompts")


def test_the_built_in_prompts_are_there(tokenizer):
    source = builtin_prompts(tokenizer)
    assert len(source.prompts) == 128
    assert "MIT" in source.licence


def test_a_model_without_a_template_gets_the_bare_text(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "bare", chat_template=None))
    path = tmp_path / "p.txt"
    path.write_text("why?\n")
    assert read_prompts(path, "", tokenizer, "--prompts").prompts == (
        tuple(tokenizer.encode("why?")),
    )
