"""A student in training computes what the engine's student computes, and is saved as that."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.engine.errors import UnsupportedModelError, WeightsMismatchError
from deployments.engine.torch_engine.models.llama import Attention
from deployments.engine.torch_engine.student import (
    cut_student,
    load_student,
    read_student,
    save_student,
)
from deployments.engine.torch_engine.student_fitting import answer_logits
from deployments.engine.torch_engine.weights.loader import load_model
from deployments.engine.training.batches import collate
from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.config import DraftTrainingConfig, StudentConfig
from deployments.engine.training.evaluation import evaluate
from deployments.engine.training.initial import draft_vocabulary
from deployments.engine.training.methods import StudentMethod, method_of
from deployments.engine.training.objective import DraftObjective
from deployments.engine.training.student_model import StudentModel
from deployments.engine.training.trainer import DraftTrainer
from deployments.engine.training.training_time_test import unroll
from tests.unit.deployments.engine.torch_engine.tiny_models import SHAPE, loaded_model
from tests.unit.deployments.engine.training.tiny_training import CONFIG, target, texts

METHOD = StudentConfig(first_layers=2, last_layers=1)


@functools.cache
def student_texts():
    """The texts of ``tiny_training`` with a student's features."""
    method = StudentMethod(METHOD, target().config)
    capture = FeatureCapture(target(), method.aux_layers, max_length=64)
    answered = [
        AnsweredPrompt(text.token_ids.tolist(), int(text.is_answer.nonzero()[0]) + 1)
        for text in texts()
    ]
    return list(capture.texts(answered))


def start():
    written = [i for text in texts() for i in text.token_ids.tolist()]
    method = StudentMethod(METHOD, target().config)
    return method.start(target(), draft_vocabulary(written, 40, 97), student_texts)


def trained(num_steps=6):
    draft, scale = start()
    config = CONFIG.model_copy(
        update={
            "learning_rate": 3e-3,
            "objective": CONFIG.objective.model_copy(update={"num_unrolls": 1}),
        }
    )
    objective = DraftObjective(draft, target().model, config.objective, scale)
    trainer = DraftTrainer(objective, config, num_steps, "cpu")
    losses = [trainer.step([student_texts()]).loss for _ in range(num_steps)]
    return objective.trained(trainer.state()["model"]), losses


def test_it_computes_what_the_engine_computes():
    draft, _ = start()
    text = texts()[0].token_ids.tolist()
    expected = answer_logits(cut_student(target(), draft._student), [text], [1])
    found = draft.logits(draft(torch.tensor([text[:-1]]), target().model.embed_tokens.weight))
    torch.testing.assert_close(found[0], expected[:, draft.draft_token_ids], rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing():
    draft, _ = start()
    embedding = target().model.embed_tokens.weight
    short = student_texts()[0]._replace(
        **{name: field[:12] for name, field in student_texts()[0]._asdict().items()}
    )
    both = collate([short, student_texts()[1]], torch.device("cpu"), torch.float32)
    alone = collate([short], torch.device("cpu"), torch.float32)
    for one, other in zip(
        unroll(draft, embedding, both, 2), unroll(draft, embedding, alone, 2), strict=True
    ):
        kept = other.is_answer[0].nonzero().squeeze(1)
        torch.testing.assert_close(one.hidden[0, kept], other.hidden[0, kept], rtol=1e-4, atol=1e-4)
        assert one.is_answer[0, :12].equal(other.is_answer[0])


def test_training_makes_it_better_and_changes_the_target_not_at_all():
    before = {name: tensor.clone() for name, tensor in target().model.state_dict().items()}
    draft, losses = trained()
    assert losses[-1] < losses[0]
    embedding = target().model.embed_tokens.weight
    qualities = [evaluate(one, embedding, student_texts(), 3) for one in (start().draft, draft)]
    assert qualities[1].mean_acceptance_length[2] > qualities[0].mean_acceptance_length[2]
    assert all(torch.equal(before[name], t) for name, t in target().model.state_dict().items())


def test_what_is_saved_drafts_as_it_did_but_for_eight_bits(tmp_path):
    draft, _ = trained()
    draft.save(tmp_path)
    student = read_student(tmp_path / "student.safetensors")
    assert len(student.trained) == 3 * 9 + 1
    text = texts()[0].token_ids.tolist()
    expected = draft.logits(draft(torch.tensor([text[:-1]]), target().model.embed_tokens.weight))
    found = answer_logits(cut_student(target(), student), [text], [1])
    found = found[:, draft.draft_token_ids]
    assert (found - expected[0]).abs().max() < 0.05 * expected.abs().max()
    untrained = answer_logits(cut_student(target(), start().draft._student), [text], [1])
    assert not torch.allclose(found, untrained[:, draft.draft_token_ids], atol=0.1)


def target_and_student(folder):
    """A target in a folder, and a student of it that counts as trained."""
    torch.manual_seed(3)
    shape = {**SHAPE, "num_hidden_layers": 6, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    loaded = load_model(str(folder), dtype="float32", cache_dir=folder)
    method = StudentMethod(METHOD, loaded.config)
    capture = FeatureCapture(loaded, method.aux_layers, max_length=64)
    kept = list(capture.texts([AnsweredPrompt(list(range(3, 40)), 4)] * 4))
    return loaded, method.start(loaded, torch.arange(3, 43), lambda: kept).draft.weights()


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    _, student = target_and_student(folder)
    return folder, save_student(student, folder)


def test_engines_load_it_where_the_target_lies(tmp_path):
    loaded, student = target_and_student(tmp_path)
    save_student(student, tmp_path)
    text = list(range(5, 30))
    cut = cut_student(loaded, student)
    expected = answer_logits(cut, [text], [1])
    for weights, tolerance in (("dense", 0.0), ("int8", 0.1), ("int4", 1.0)):
        found = load_student(str(tmp_path), dtype="float32", cache_dir=tmp_path, weights=weights)
        drafted = torch.isfinite(expected)
        got = answer_logits(found, [text], [1])
        assert torch.equal(torch.isfinite(got), drafted)
        torch.testing.assert_close(got[drafted], expected[drafted], rtol=tolerance, atol=tolerance)
    assert (
        load_student(str(tmp_path), dtype="float32", cache_dir=tmp_path).weights_digest
        == cut.weights_digest
    )


def without(name):
    return lambda tensors, _: tensors.pop(name)


def with_another(tensors, _):
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), r"missing.*layers\.1\.mlp\.up_proj"),
        (without("model.norm.weight"), r"lacks model\.norm"),
        (without("connector.bias"), r"connector\.bias"),
        (without("draft_token_ids"), "draft_token_ids"),
        (with_another, "q_norm.* has no place"),
        (lambda _, metadata: metadata.update(card='{"joint": 1}'), "logit_scale"),
        (lambda _, metadata: metadata.pop("card"), "card"),
    ],
)
def test_a_file_with_a_missing_or_unknown_part_is_refused(trained_file, tmp_path, change, problem):
    folder, path = trained_file
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed, metadata=metadata)
    with pytest.raises(WeightsMismatchError, match=problem):
        load_student(str(folder), dtype="float32", cache_dir=folder, student_file=changed)


def test_the_method_is_configured():
    config = DraftTrainingConfig(method="student", student=METHOD)
    assert isinstance(method_of(config, target().config), StudentMethod)


def test_targets_that_have_no_student_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="6 layers"):
        StudentMethod(StudentConfig(first_layers=3, last_layers=3), target().config)
    student = start().draft._student
    with pytest.raises(UnsupportedModelError, match=r"multiples of 32, not \[48, 64\]"):
        StudentModel(loaded_model().config, student)
    monkeypatch.setattr(Attention, "is_standard", False)
    with pytest.raises(UnsupportedModelError, match="attention of its own"):
        StudentModel(target().config, student)
