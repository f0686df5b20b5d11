"""A model whose narrow forwards read the blocks of a GGUF file."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.weights.loader import load_model
from deployments.engine.torch_engine.weights.packed import attach_blocks
from tests.unit.deployments.engine.torch_engine.tiny_models import batch_of

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 70
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
}
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def write_model(folder, kinds=None):
    """A random model; ``kinds`` names matrices that are not quantised as Q4_1."""
    rng = np.random.default_rng(9)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)

    def add(name, shape, kind):
        values = (rng.standard_normal(shape) * 0.3).astype(np.float32)
        if kind is None:
            writer.add_tensor(name, values + 1)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (VOCAB, HIDDEN), Q8_0)
    add("output_norm.weight", (HIDDEN,), None)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", (HIDDEN,), None)
        for matrix, shape in MATRICES.items():
            kind = (kinds or {}).get(matrix, Q4_1)
            add(f"blk.{layer}.{matrix}.weight", shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "config.json").write_text(json.dumps(CONFIG))


def logits(folder, weights, dtype="float32"):
    loaded = load_model(str(folder), dtype=dtype, cache_dir=folder, weights=weights)
    cache = KVCache(loaded.config, 1, dtype=loaded.model.dtype)
    runner = ModelRunner(loaded.model, loaded.config, cache)
    return runner.forward(batch_of((list(range(3, 12)), range(9), range(9), [], None)))


def test_in_float32_the_blocks_compute_what_the_dense_weights_do(tmp_path):
    write_model(tmp_path)
    expected, got = logits(tmp_path, "dense"), logits(tmp_path, "file")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, expected)


def test_in_bfloat16_the_blocks_are_nearer_to_the_exact_weights(tmp_path):
    write_model(tmp_path)
    truth = logits(tmp_path, "dense")
    dense, blocks = (logits(tmp_path, weights, "bfloat16") for weights in ("dense", "file"))
    assert 0 < (blocks - truth).square().mean() < (dense - truth).square().mean()


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        ({"attn_k": Q8_0}, r"layers\.0\.attention\.qkv_proj, which has Q4_1, Q8_0"),
        ({"ffn_down": gguf.GGMLQuantizationType.Q4_0}, r"down_proj, which has Q4_0"),
        ({"attn_output": None}, r"o_proj, which has no quantised numbers"),
    ],
)
def test_other_blocks_are_refused_by_name(kinds, named, tmp_path):
    write_model(tmp_path, kinds)
    with pytest.raises(UnsupportedModelError, match=named):
        logits(tmp_path, "file")


def test_a_file_that_is_not_gguf_has_no_blocks(tmp_path):
    with pytest.raises(UnsupportedModelError, match="needs a GGUF file"):
        attach_blocks(torch.nn.Module(), [tmp_path / "model.safetensors"])
