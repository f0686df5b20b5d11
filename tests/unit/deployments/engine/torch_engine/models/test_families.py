from __future__ import annotations

import pytest
import torch

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.assembly import build_core
from deployments.engine.torch_engine.models import model_class, supported_model_types
from tests.fakes_engine import make_config, make_request
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    CONFIGS,
    batch_of,
    loaded_model,
    parts_of,
    reference_logits,
    reference_model,
    runner_of,
)

TEXT = torch.randint(97, (150,), generator=torch.Generator().manual_seed(5)).tolist()
OTHER = torch.randint(97, (70,), generator=torch.Generator().manual_seed(6)).tolist()

every_family = pytest.mark.parametrize("name", CONFIGS)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def shuffled_slots():
    return torch.randperm(8 * 64, generator=torch.Generator().manual_seed(7)).tolist()


@every_family
def test_prefill_equals_transformers(name, shuffled_slots):
    slots = shuffled_slots[: len(TEXT)]
    batch = batch_of((TEXT, range(len(TEXT)), slots, [], None))
    close(runner_of(loaded_model(name)).forward(batch), reference_logits(name, TEXT))


@every_family
def test_chunked_prefill_and_decode_equal_transformers(name, shuffled_slots):
    runner = runner_of(loaded_model(name))
    got = []
    for start, end in ((0, 70), (70, 140), (140, 145), *((at, at + 1) for at in range(145, 150))):
        part = (TEXT[start:end], range(start, end), shuffled_slots[start:end])
        got.append(runner.forward(batch_of((*part, shuffled_slots[:start], None))))
    close(torch.cat(got), reference_logits(name, TEXT))


@every_family
def test_a_ragged_batch_equals_each_sequence_alone(name, shuffled_slots):
    runner = runner_of(loaded_model(name))
    lengths = (3, 40, 33, 66, 70)
    homes, parts = [], []
    for index, length in enumerate(lengths):
        home = shuffled_slots[index * 71 : index * 71 + length]
        homes.append(home)
        prefill = (OTHER[: length - 2], range(length - 2), home[:-2], [], None)
        runner.forward(batch_of(prefill))
    for index, length in enumerate(lengths):
        home = homes[index]
        rest = 2 if index != 3 else 1  # two span lengths in one batch
        cut = length - rest
        if rest == 1:
            runner.forward(
                batch_of((OTHER[cut - 1 : cut], [cut - 1], home[-2:-1], home[:-2], None))
            )
        parts.append((OTHER[cut:length], range(cut, length), home[cut:], home[:cut], None))
    got = runner.forward(batch_of(*parts))
    expected = [
        reference_logits(name, OTHER[:length])[-len(part[0]) :]
        for length, part in zip(lengths, parts, strict=True)
    ]
    close(got, torch.cat(expected))


@every_family
def test_a_tree_equals_its_paths_as_separate_sequences(name, shuffled_slots):
    runner = runner_of(loaded_model(name))
    prefix = TEXT[:20]
    home = shuffled_slots[:20]
    runner.forward(batch_of((prefix, range(20), home, [], None)))
    tokens, parents = [5, 6, 7, 8, 9, 10], [-1, -1, 0, 0, 2, 1]
    mask = torch.eye(6, dtype=torch.bool)
    depths = []
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    got = runner.forward(
        batch_of((tokens, [20 + depth for depth in depths], shuffled_slots[20:26], home, mask))
    )
    for node in range(6):
        path = [tokens[other] for other in range(6) if mask[node, other]]
        close(got[node], reference_logits(name, prefix + path)[-1])


@every_family
def test_captured_features_are_the_residual_stream(name, shuffled_slots):
    runner = runner_of(loaded_model(name))
    batch = batch_of(
        (TEXT[:30], range(30), shuffled_slots[:30], [], None),
        (OTHER[:9], range(9), shuffled_slots[30:39], [], None),
        logit_rows=[29],
    )
    output = runner.forward_with_features(batch, (2, 0))
    with torch.inference_mode():
        for text, rows in ((TEXT[:30], slice(0, 30)), (OTHER[:9], slice(30, 39))):
            streams = reference_model(name)(
                torch.tensor([text]), output_hidden_states=True
            ).hidden_states
            close(output.features[0][rows], streams[2][0])
            close(output.features[1][rows], streams[0][0])
    assert output.logits.shape == (1, 97)
    assert output.logits.dtype == torch.float32


@every_family
@pytest.mark.parametrize("path", ["narrow", "modules"])
def test_greedy_text_equals_transformers(name, path, monkeypatch):
    prompts = [TEXT[:40], OTHER[:3], TEXT[:40] + OTHER[:50]]
    with torch.inference_mode():
        expected = [
            reference_model(name)
            .generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
            )[0, len(prompt) :]
            .tolist()
            for prompt in prompts
        ]
    config = make_config(max_batch_tokens=64)
    parts = parts_of(loaded_model(name), config)
    if path == "modules":
        monkeypatch.setattr(parts.runner, "_narrow", None)
    core = build_core(config, parts, wake=lambda: None)
    texts = [[] for _ in prompts]
    for session_id, prompt in enumerate(prompts):
        core.add(session_id, make_request(f"r{session_id}", prompt, max_tokens=30))
    while core.step():
        for session_id, delta in core.take_events():
            texts[session_id] += delta.token_ids
    assert texts == expected


def test_a_text_beyond_the_models_window_is_refused():
    for name in ("mistral-windowed", "qwen2-tied-yarn"):
        config = loaded_model(name).config
        config.check_context(150)
        with pytest.raises(UnsupportedModelError, match="sliding window of 150"):
            config.check_context(151)
    loaded_model("mistral").config.check_context(512)


def test_bfloat16_stays_near_float32(shuffled_slots):
    batch = batch_of((TEXT[:40], range(40), shuffled_slots[:40], [], None))
    exact = runner_of(loaded_model()).forward(batch)
    rounded = runner_of(loaded_model(dtype="bfloat16")).forward(batch)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_rows_of_other_sequences_never_matter(shuffled_slots):
    runner = runner_of(loaded_model())
    alone = batch_of((TEXT[:9], range(9), shuffled_slots[:9], [], None))
    expected = runner.forward(alone)
    for pool in (runner.kv_cache.k, runner.kv_cache.v):
        pool.fill_(torch.nan)
    short = (TEXT[:9], range(9), shuffled_slots[:9], [], None)
    runner.forward(batch_of((OTHER[:3], range(3), shuffled_slots[50:53], [], None)))
    longer = (OTHER[3:12], range(3, 12), shuffled_slots[53:62], shuffled_slots[50:53], None)
    got = runner.forward(batch_of(short, longer))
    close(got[:9], expected)


def test_an_unknown_family_is_refused_by_name():
    assert supported_model_types() == ("llama", "mistral", "qwen2", "qwen3")
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        model_class("mamba")
