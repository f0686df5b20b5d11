"""Replicas of simulated engines start without the libraries that only real models need."""

from __future__ import annotations

import json
import subprocess
import sys

from deployments.engine.config import EngineConfig
from deployments.tokenizer import Tokenizer, load_vocabulary
from tests.fakes_tokenizer import write_tokenizer

_HEAVY = ("torch", "transformers", "numba", "huggingface_hub")
_SCRIPT = """
import json, sys
from pathlib import Path
import deployments.draft, deployments.ingress, deployments.target
from deployments.config import DraftPoolConfig
from deployments.drafters import build_drafter
from deployments.engine.config import EngineConfig
from deployments.tokenizer import load_vocabulary
folder = Path(sys.argv[1])
engine = EngineConfig(kind="simulated", model=str(folder))
build_drafter(DraftPoolConfig(), engine, folder)
load_vocabulary(engine, folder)
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
"""


def test_a_simulated_draft_replica_imports_no_heavy_library(tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 262}))
    ended = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), *_HEAVY],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == []


def test_the_vocabulary_of_the_file_is_the_tokenizers(tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    light = load_vocabulary(EngineConfig(kind="simulated"), folder)
    whole = Tokenizer.load(folder)
    assert not isinstance(light, Tokenizer)
    assert isinstance(load_vocabulary(EngineConfig(), folder), Tokenizer)
    assert light.vocab_size == whole.vocab_size
    assert light.vocab_digest() == whole.vocab_digest()
    ids = whole.encode("the thin <|im_end|> line")
    assert light.decode(ids) == whole.decode(ids)
