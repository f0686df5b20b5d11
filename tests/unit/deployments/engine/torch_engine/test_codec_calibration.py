from __future__ import annotations

import pytest
import torch

from deployments.engine.torch_engine.codec_calibration import calibrate_codecs
from deployments.engine.torch_engine.weights.loader import load_model
from tests.unit.deployments.engine.torch_engine.tiny_models import SHAPE

CODECS = ["raw", "lossless", "int8", "k8v4", "int4"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(folder)
    return load_model(str(folder), dtype="float32", cache_dir=folder)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(6)
    return {name: torch.randint(3, 97, (250,), generator=generator).tolist() for name in "ab"}


def test_exact_codecs_lose_nothing_and_fewer_bits_lose_more(loaded, texts):
    told: list[str] = []
    calibration = calibrate_codecs(
        loaded, "tiny", texts, CODECS, num_continued=60, progress=told.append
    )
    assert calibration.fingerprint == loaded.page_layout().fingerprint.hex()
    assert calibration.num_tokens == 2 * 59
    raw, lossless, int8, k8v4, int4 = calibration.codecs
    for exact in (raw, lossless):
        assert (exact.kl, exact.top1) == (0, 1)
        assert exact.perplexity == exact.perplexity_untouched
    assert 0 < int8.kl < k8v4.kl < int4.kl
    assert int8.top1 >= int4.top1
    assert 0.98 < raw.ratio < 1
    assert 3 < int8.ratio < int4.ratio
    assert len(told) == 2 * (1 + len(CODECS))


def test_the_same_text_gives_the_same_loss(loaded, texts):
    def losses():
        calibration = calibrate_codecs(
            loaded, "tiny", texts, ["int4"], num_continued=60, progress=lambda _: None
        )
        return calibration.codecs[0].kl, calibration.codecs[0].perplexity

    assert losses() == losses()


def test_a_text_without_a_full_page_is_refused(loaded):
    with pytest.raises(ValueError, match="too few"):
        calibrate_codecs(
            loaded, "tiny", {"short": [5] * 100}, CODECS, num_continued=60, progress=print
        )
