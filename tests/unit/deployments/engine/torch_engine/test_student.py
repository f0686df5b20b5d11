from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deployments.engine.errors import WeightsMismatchError, WeightsMissingError
from deployments.engine.speculation.types import DraftQuery, DraftSampling, DraftTree
from deployments.engine.torch_engine.kernels import narrow_forward
from deployments.engine.torch_engine.kernels.narrow_forward import NarrowForward
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.lm_drafter import CausalLMDrafter
from deployments.engine.torch_engine.models.llama import Weight
from deployments.engine.torch_engine.student import (
    StudentWeights,
    cut_student,
    load_student,
    read_student,
    save_student,
    student_path,
)
from deployments.engine.torch_engine.student_fitting import (
    draft_vocabulary,
    fit_connector,
    fit_student,
)
from deployments.engine.torch_engine.weights.loader import load_model
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    SHAPE,
    batch_of,
    loaded_model,
    runner_of,
)

PROMPTS = torch.randint(3, 97, (12, 9), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("target")
    shape = {**SHAPE, "num_hidden_layers": 6, "intermediate_size": 64}
    config = LlamaConfig(**shape, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(str(folder), dtype="float32", cache_dir=folder)


def a_student(target, **changes):
    size = target.config.hidden_size
    student = StudentWeights(
        connector_weight=torch.randn(size, size, generator=torch.Generator().manual_seed(1)),
        connector_bias=torch.arange(float(size)),
        draft_token_ids=torch.arange(target.config.vocab_size, dtype=torch.int32),
        logit_scale=0.5,
        kept_layers=(0, 1, 4, 5),
        joint=2,
        target_digest=target.weights_digest,
        num_positions=1,
        agreement=0.25,
    )
    return replace(student, **changes)


def logits_of(loaded):
    text = PROMPTS[0]
    return runner_of(loaded).forward(batch_of((text, range(9), range(9), [], None)))


def test_the_connector_is_found_where_one_exists():
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(500, 8, generator=generator)
    weight, bias = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    outputs = inputs @ weight.T + bias
    found_weight, found_bias = fit_connector(inputs, outputs, torch.arange(500) % 2 == 0)
    torch.testing.assert_close(found_weight, weight, rtol=0, atol=5e-3)
    torch.testing.assert_close(found_bias, bias, rtol=0, atol=5e-3)


def test_a_student_that_drops_nothing_is_its_target(target):
    size = target.config.hidden_size
    whole = a_student(
        target,
        connector_weight=torch.eye(size),
        connector_bias=torch.zeros(size),
        logit_scale=1.0,
        kept_layers=(0, 1, 2, 3, 4, 5),
    )
    student = logits_of(cut_student(target, whole))
    torch.testing.assert_close(student, logits_of(target), rtol=1e-4, atol=1e-4)


def test_a_student_guesses_only_its_draft_vocabulary(target):
    few = torch.tensor([3, 5, 70], dtype=torch.int32)
    everything = logits_of(cut_student(target, a_student(target)))
    reduced = logits_of(cut_student(target, a_student(target, draft_token_ids=few)))
    torch.testing.assert_close(reduced[:, few.long()], everything[:, few.long()])
    assert torch.isneginf(reduced).sum() == reduced.numel() - 3 * reduced.shape[0]


def test_the_draft_vocabulary_holds_what_was_written_then_low_ids():
    ids = draft_vocabulary([40_000, 30_000, 40_000], 49_152)
    assert len(ids) == 8192
    assert ids[-2:].tolist() == [30_000, 40_000]
    assert ids[:8190].tolist() == list(range(8190))
    assert draft_vocabulary([2], 97).tolist() == list(range(97))


def test_a_saved_student_is_the_one_that_was_cut(target, tmp_path):
    before = logits_of(target)
    student = a_student(target)
    path = save_student(student, tmp_path)
    assert path == student_path(tmp_path, target.weights_digest)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded = load_student(str(target.folder), dtype="float32", cache_dir=tmp_path)
    cut = cut_student(target, student)
    assert torch.equal(logits_of(loaded), logits_of(cut))
    assert loaded.weights_digest == cut.weights_digest != target.weights_digest
    assert loaded.page_layout().num_layers == 4
    assert torch.equal(logits_of(target), before)  # the target lends its weights, unchanged
    assert not torch.equal(logits_of(cut), before)


def test_compiled_layers_compute_what_the_modules_do(target):
    few = torch.tensor([3, 5, 70], dtype=torch.int32)
    student = cut_student(target, a_student(target, draft_token_ids=few))
    cache = KVCache(student.config, 1, dtype=torch.float32)
    batch = batch_of((PROMPTS[0], range(9), range(9), [8], None))
    expected = student.model(batch, cache, (1, 2, 4))
    compiled = NarrowForward(student.model, cache, 4, num_threads=1)
    logits, features = compiled.forward_with_features(batch, (1, 2, 4))
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(features, expected.features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_students_matrices_may_be_quantised(dtype, target, tmp_path, monkeypatch):
    monkeypatch.setattr(narrow_forward, "multiplies_bfloat16", lambda: False)
    few = torch.tensor([3, 5, 70], dtype=torch.int32)
    save_student(a_student(target, draft_token_ids=few), tmp_path)

    def load(weights):
        return load_student(str(target.folder), dtype=dtype, cache_dir=tmp_path, weights=weights)

    dense, quantised, automatic = load("dense"), load("int8"), load("auto")
    rows = logits_of(quantised)[:, few.long()]
    torch.testing.assert_close(rows, logits_of(dense)[:, few.long()], rtol=0.1, atol=0.1)
    drafter = CausalLMDrafter(quantised, num_pages=2)
    query = DraftQuery(
        session_id=1,
        token_ids=tuple(PROMPTS[0]),
        in_flight=DraftTree(),
        num_draft_tokens=3,
        fanout=2,
        sampling=DraftSampling(seed=1),
    )
    before = drafter.propose([query])
    drafter.warm_up()  # drops the dense copies
    drafter.close(1)
    assert drafter.propose([query]) == before
    assert quantised.model.embed_tokens.weight.numel() == 0
    # This checkpoint has no blocks of its own.
    assert all(m.packed is None for m in automatic.model.modules() if isinstance(m, Weight))


def test_files_that_are_missing_damaged_or_foreign_are_refused(target, tmp_path):
    with pytest.raises(WeightsMissingError, match="paceline train student"):
        load_student(str(target.folder), dtype="float32", cache_dir=tmp_path)
    path = save_student(a_student(target), tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(WeightsMismatchError, match="cannot be read"):
        read_student(path)
    with pytest.raises(FileNotFoundError):
        read_student(tmp_path / "nowhere")
    other = save_student(a_student(target, target_digest="f00d"), tmp_path)
    other.replace(path)
    with pytest.raises(WeightsMismatchError, match="f00d"):
        load_student(str(target.folder), dtype="float32", cache_dir=tmp_path)


def test_fitting_makes_a_student_that_drafts(target):
    lines = []
    student = fit_student(target, PROMPTS, tokens_budget=800, progress=lines.append)
    assert student.kept_layers == (0, 1, 4, 5)
    assert student.num_positions > 100
    assert 0 <= student.agreement <= 1
    assert "held-out" in lines[-1]
    query = DraftQuery(
        session_id=1,
        token_ids=tuple(PROMPTS[0]),
        in_flight=DraftTree(),
        num_draft_tokens=3,
        fanout=2,
        sampling=DraftSampling(seed=1),
    )
    rows = CausalLMDrafter(cut_student(target, student), num_pages=2, least_chance=0.0).propose(
        [query]
    )[0]
    assert [len(row.draft_token_ids) for row in rows] == [3, 3]


def test_models_without_middle_layers_and_empty_prompt_lists_are_refused(target):
    with pytest.raises(ValueError, match="3 layers"):
        fit_student(loaded_model(), PROMPTS, progress=lambda _: None)
    with pytest.raises(ValueError, match="two prompts"):
        fit_student(target, [PROMPTS[0], [5] * 400], progress=lambda _: None)
