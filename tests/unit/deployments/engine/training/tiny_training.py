"""A tiny target, texts that it wrote, and heads for it."""

from __future__ import annotations

import functools

import torch

from deployments.engine.torch_engine.eagle3 import Eagle3Config
from deployments.engine.training.batches import collate
from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.config import ObjectiveConfig, TrainingConfig
from deployments.engine.training.initial import draft_vocabulary, feature_scale, random_head
from deployments.engine.training.objective import DraftObjective
from tests.unit.deployments.engine.torch_engine.tiny_models import loaded_model

CONFIG = TrainingConfig(
    objective=ObjectiveConfig(num_unrolls=3), draft_vocab_size=40, batch_tokens=128
)


@functools.cache
def target():
    return loaded_model("llama-of-6-layers")


@functools.cache
def texts(count=12, seed=5):
    """Greedy answers of 24 tokens to prompts of 5, with features."""
    loaded = target()
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 97, (count, 5), generator=generator).tolist()
    capture = FeatureCapture(loaded, head_config().aux_layers, max_length=64)
    answered = []
    for prompt in prompts:
        token_ids = list(prompt)
        for _ in range(24):
            (text,) = capture.texts([AnsweredPrompt([*token_ids, 0], len(token_ids))])
            token_ids.append(int(text.wanted[-2]))
        answered.append(AnsweredPrompt(token_ids, len(prompt)))
    return list(capture.texts(answered))


def head_config():
    return Eagle3Config.for_target(target().config, 40)


def head(seed=1, of=None):
    written = [
        i for text in of or texts() for i in text.token_ids[1:][text.is_answer[:-1]].tolist()
    ]
    return random_head(head_config(), draft_vocabulary(written, 40, 97), seed)


def scale():
    return feature_scale(texts())


def batch(count=3):
    return collate(texts()[:count], torch.device("cpu"), torch.float32)


def objective(a_head=None, **changes):
    config = CONFIG.objective.model_copy(update=changes)
    return DraftObjective(a_head or head(), target().model, config, scale())
