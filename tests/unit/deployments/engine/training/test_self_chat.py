"""What a target writes to itself, and whether its features are those of what it wrote."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.models.llama import Attention
from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.config import SelfChatConfig
from deployments.engine.training.self_chat import ChatFrame, SelfChat
from tests.unit.deployments.engine.torch_engine.tiny_models import loaded_model

FRAME = ChatFrame((4, 5, 6), (7, 8, 9))
CONFIG = SelfChatConfig(
    num_together=20, max_prompt_tokens=40, max_tokens=24, temperatures=(0.0, 0.8)
)
LAYERS = (0, 2, 2)
NAMES = ("llama", "llama-biased-untied", "qwen2-tied-yarn", "qwen3")


def chat(name="llama", seed="a", **changes):
    return SelfChat(
        loaded_model(name),
        FRAME,
        LAYERS,
        CONFIG.model_copy(update=changes),
        seed=seed,
        dtype=torch.float32,
    )


def prompt_length(text):
    return int(text.is_answer.nonzero()[0]) + 1


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_reading_the_text_again(name):
    # Rows move between neighbours as texts end; more texts than rows show that none is mixed up.
    for text in islice(chat(name).texts(), 60):
        start = prompt_length(text)
        answered = AnsweredPrompt(text.token_ids.tolist(), start)
        (again,) = FeatureCapture(loaded_model(name), LAYERS, max_length=128).texts([answered])
        torch.testing.assert_close(text.features, again.features, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(text.hidden, again.hidden, rtol=1e-3, atol=1e-3)
        assert torch.equal(text.is_answer, again.is_answer)


def test_a_text_is_a_prompt_in_its_frame_and_an_answer_within_bounds():
    texts = list(islice(chat().texts(), 40))
    for text in texts:
        token_ids, start = text.token_ids.tolist(), prompt_length(text)
        assert tuple(token_ids[:3]) == FRAME.opening
        assert tuple(token_ids[start - 3 : start]) == FRAME.closing
        assert 6 <= start - 6 <= 40
        assert 7 not in token_ids[3 : start - 3]
        # The last token is never read.
        assert len(token_ids) - start < 24
        assert 2 not in token_ids
    assert len({tuple(text.token_ids.tolist()) for text in texts}) == 40


def test_greedy_answers_are_the_likeliest_and_sampled_ones_are_not():
    def share(temperatures):
        right = count = 0
        for text in islice(chat().texts(temperatures), 30):
            rows = text.is_answer.nonzero().squeeze(1)
            right += int((text.token_ids[rows + 1] == text.wanted[rows]).sum())
            count += len(rows)
        return right / count

    assert share((0.0,)) == 1.0
    assert share((3.0,)) < 0.9


def test_texts_follow_the_seed():
    one, same, other = (
        [text.token_ids.tolist() for text in islice(chat(seed=seed).texts(), 8)]
        for seed in ("a", "a", "b")
    )
    assert one == same != other


def test_models_with_an_attention_of_their_own_are_refused(monkeypatch):
    monkeypatch.setattr(Attention, "is_standard", False)
    with pytest.raises(UnsupportedModelError, match="attention of its own"):
        chat()
