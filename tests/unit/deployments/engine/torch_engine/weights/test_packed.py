"""A model whose narrow forwards read the blocks of a GGUF file."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.kernels import narrow_forward
from deployments.engine.torch_engine.kernels import vectors as kernel_forms
from deployments.engine.torch_engine.kernels.packing import pack_blocks
from deployments.engine.torch_engine.kernels.unpacking import unpack_rows
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.models import llama
from deployments.engine.torch_engine.weights.loader import load_model
from deployments.engine.torch_engine.weights.packed import file_blocks
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


def logits(folder, weights, dtype="float32", starts=(3,)):
    loaded = load_model(str(folder), dtype=dtype, cache_dir=folder, weights=weights)
    cache = KVCache(loaded.config, 1, dtype=loaded.model.dtype)
    runner = ModelRunner(loaded.model, loaded.config, cache)
    texts = [list(range(start, start + 9)) for start in starts]
    return torch.cat(
        [runner.forward(batch_of((text, range(9), range(9), [], None))) for text in texts]
    )


def test_in_float32_the_blocks_compute_what_the_dense_weights_do(tmp_path):
    write_model(tmp_path)
    expected, got = logits(tmp_path, "dense"), logits(tmp_path, "file")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, expected)


def test_in_bfloat16_the_blocks_are_nearer_to_the_exact_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(llama.Model, "compute_dtype", property(lambda model: model.dtype))
    write_model(tmp_path)
    starts = range(0, VOCAB - 9, 2)  # what single rows round to is chance
    truth = logits(tmp_path, "dense", starts=starts)
    dense, blocks = (logits(tmp_path, form, "bfloat16", starts) for form in ("dense", "file"))
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
        list(file_blocks([tmp_path / "model.safetensors"], ()))


def write_checkpoint(folder, columns=HIDDEN):
    """A random checkpoint without any quantised number."""
    rng = np.random.default_rng(4)
    model = llama.Model(ModelConfig.from_hf(CONFIG | {"hidden_size": columns}), dtype=torch.float32)
    tensors = {
        name: torch.from_numpy((rng.standard_normal(target.shape) * 0.3).astype(np.float32))
        for name, target in model.weight_targets().items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": columns}))


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.02), ("int4", 0.3)])
def test_any_checkpoint_can_be_rounded_to_blocks(weights, bound, tmp_path):
    write_checkpoint(tmp_path)
    exact = logits(tmp_path, "dense")
    narrow = logits(tmp_path, weights)
    loaded = load_model(str(tmp_path), dtype="float32", cache_dir=tmp_path, weights=weights)
    cache = KVCache(loaded.config, 1, dtype=torch.float32)
    wide = loaded.model(batch_of((list(range(3, 12)), range(9), range(9), [], None)), cache).logits
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-4)
    assert 0 < (wide - exact).square().mean() < bound**2 * exact.square().mean()
    # The scale of eight bits is that of the vocabulary in any case.
    assert loaded.model.embed_tokens.packed.form == kernel_forms.Q8_0
    form = loaded.model.layers[0].mlp.down_proj.packed.form
    assert form == (kernel_forms.Q8_0 if weights == "int8" else kernel_forms.Q4_1)


def test_pages_of_rounded_weights_are_others(tmp_path):
    write_checkpoint(tmp_path)
    found = {
        load_model(str(tmp_path), dtype="float32", cache_dir=tmp_path, weights=weights)
        .page_layout()
        .fingerprint
        for weights in ("dense", "int8", "int4")
    }
    assert len(found) == 3


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    write_checkpoint(tmp_path, columns=80)
    with pytest.raises(UnsupportedModelError, match="has 80 columns, which 32 must divide"):
        load_model(str(tmp_path), dtype="float32", cache_dir=tmp_path, weights="int8")


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_compiled_code_computes_all_widths_no_dense_copy_is_read(
    dtype, has_units, is_deterministic, tmp_path, monkeypatch
):
    monkeypatch.setattr(narrow_forward, "multiplies_bfloat16", lambda: has_units)
    write_model(tmp_path)
    loaded = load_model(str(tmp_path), dtype=dtype, cache_dir=tmp_path, weights="file")
    cache = KVCache(loaded.config, 1, dtype=loaded.model.dtype)
    runner = ModelRunner(loaded.model, loaded.config, cache, is_deterministic=is_deterministic)
    assert runner.is_compiled is (is_deterministic or not has_units)
    # Others share pages whatever their processors.
    assert (runner.arithmetic == "torch") is not is_deterministic
    if not runner.is_compiled:
        return
    batch = batch_of((list(range(3, 12)), range(9), range(9), [], None))
    expected, embedded = runner.forward(batch), loaded.model.embed(batch.token_ids)
    loaded.model.drop_dense()
    assert torch.equal(runner.forward(batch), expected)
    # The dense copy is rounded to bfloat16, also where processors without it compute in float32.
    rtol = 2.0**-8 if dtype == "bfloat16" else 1.3e-6
    again = loaded.model.embed(batch.token_ids)
    torch.testing.assert_close(again, embedded, rtol=rtol, atol=1e-5)
    assert all(m.weight.numel() == 0 for m in loaded.model.modules() if isinstance(m, llama.Weight))


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_rows_are_unpacked_to_what_their_blocks_mean(kind):
    generator = np.random.default_rng(1)
    blocks = gguf.quants.quantize(generator.standard_normal((37, 96), dtype=np.float32), kind)
    form = kernel_forms.Q4_1 if kind == Q4_1 else kernel_forms.Q8_0
    rows = np.array([36, 0, 17, 17, 5])
    out = np.full((7, 96), np.nan, dtype=np.float32)
    unpack_rows(pack_blocks([blocks[:20], blocks[20:]], form), rows, out)
    np.testing.assert_allclose(
        out[:5], gguf.quants.dequantize(blocks, kind)[rows], rtol=1e-6, atol=1e-6
    )
    assert np.isnan(out[5:]).all()
