from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from deployments.engine.config import TorchEngineConfig
from deployments.engine.errors import UnsupportedModelError, WeightsMissingError
from deployments.model_files import context_length, served_model_name
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("max_model_len", "num_pages", "length"),
    [(100, 1000, 100), (4096, 1000, 1024), (4096, 3, 192)],
)
def test_the_shortest_of_setting_model_and_memory_counts(
    tmp_path: Path, max_model_len: int, num_pages: int, length: int
) -> None:
    engine = TorchEngineConfig(max_model_len=max_model_len, num_pages=num_pages)
    assert context_length(engine, write_tokenizer(tmp_path)) == length


@pytest.mark.parametrize(
    ("model", "given", "name"),
    [("org/name", None, "name"), ("/models/name/", None, "name"), ("org/name", "mine", "mine")],
)
def test_clients_know_a_model_by_the_last_part_of_its_name(
    model: str, given: str | None, name: str
) -> None:
    assert served_model_name(TorchEngineConfig(model=model, served_model_name=given)) == name


def test_a_folder_that_does_not_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissingError):
        context_length(TorchEngineConfig(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnsupportedModelError, match="max_position_embeddings"):
        context_length(TorchEngineConfig(), tmp_path)
