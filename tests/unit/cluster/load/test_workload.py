"""What is asked: questions, lengths, and public traces with what their prompts share."""

from __future__ import annotations

import json

import pytest

from cluster.errors import ConfigError
from cluster.load.workload import of_lengths, of_questions, of_trace, read_questions


def mooncake(path, rows):
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_questions_begin_again():
    requests = list(of_questions([0.5, 1, 2], ["a", "b"], 9))
    assert [(request.at_s, request.prompt) for request in requests] == [
        (0.5, "a"),
        (1, "b"),
        (2, "a"),
    ]
    assert all(request.max_tokens == 9 and not request.ignore_eos for request in requests)


def test_questions_of_a_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "why?"}]
    path.write_text(json.dumps({"messages": messages}) + '\n{"prompt": "how?"}\n')
    assert read_questions(path) == ["why?", "how?"]


def test_lengths_share_nothing():
    one, other = of_lengths([0, 1], 100, 20, seed=1)
    assert len(one.prompt) == len(other.prompt) == 100
    assert one.prompt[:4] != other.prompt[:4]
    assert one.ignore_eos
    assert one.max_tokens == 20


def test_mooncake_prompts_share_their_blocks(tmp_path):
    rows = [(0, 1200, 40, [7, 8, 9]), (3000, 1100, 80, [7, 8, 5]), (90_000, 10, 1, [1])]
    path = mooncake(tmp_path / "trace.jsonl", rows)
    first, second = of_trace(path, speed=2, scale=0.5, seconds=30)
    assert (first.at_s, second.at_s) == (0, 1.5)
    assert (len(first.prompt), len(second.prompt)) == (600, 550)
    assert (first.max_tokens, second.max_tokens) == (20, 40)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:514] != second.prompt[512:514]


@pytest.mark.parametrize(
    "text",
    [
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,600,44\n4.5,20,9\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,600,44\n"
        "2023-11-16 18:15:51.1805900,20,9\n",
    ],
)
def test_azure_prompts_have_lengths(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    first, second = of_trace(path, speed=1, scale=1, seconds=60)
    assert (first.at_s, second.at_s) == (0, pytest.approx(4.5))
    assert (len(first.prompt), len(second.prompt)) == (600, 20)
    assert (first.max_tokens, second.max_tokens) == (44, 9)
    assert first.prompt[:4] != second.prompt[:4]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trace.csv", "a,b\n1,2\n"),
        ("trace.jsonl", "no json\n"),
        ("trace.jsonl", '{"timestamp": 1}\n'),
        ("trace.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\nx,1,1\n"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=name):
        list(of_trace(path, speed=1, scale=1, seconds=60))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        list(of_trace(tmp_path / "none.csv", speed=1, scale=1, seconds=60))
