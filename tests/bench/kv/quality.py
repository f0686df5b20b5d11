"""What each codec costs in meaning: a real model goes on from KV that went through it.

The whole prompt's keys and values are packed and unpacked page by page, as the tier does it; the
continuation is then read with them, token by token as given, and each token's distribution is
compared with the one over untouched KV. Arithmetic is float32; pages are bfloat16, and so is the
untouched KV, so that only the codec is measured.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from kv_store import PAGE_TOKENS, Namespace, PageLayout
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec
from kv_store.page_format import decode_page, encode_page

if TYPE_CHECKING:
    from kv_store.codecs.base import Codec

_NUM_PROMPT = 2048
_NUM_CONTINUED = 256
_NUM_WINDOWS = 6
"""Of a text: the loss over one continuation alone varies by a third."""
_TEXTS = {
    "docs": ("docs/training.md", "docs/speculation.md", "docs/operations.md", "docs/sglang.md"),
    "prose": ("tests/bench/engine/alice.txt",),
}


def measure_quality() -> list[dict[str, Any]]:
    """Each codec on each text, means over windows; ratio counts headers, KL is in nats a token."""
    folder = prepare_builtin(default_cache_dir(), print)
    [gguf] = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    rows: list[dict[str, Any]] = []
    for name, paths in _TEXTS.items():
        text = "\n".join(Path(path).read_text(encoding="utf-8") for path in paths)
        ids = tokenizer(text)["input_ids"]
        length = _NUM_PROMPT + _NUM_CONTINUED
        if len(ids) < _NUM_WINDOWS * length:
            raise RuntimeError(f"the text {name} is too short: {len(ids)} tokens")
        windows = [ids[number * length : (number + 1) * length] for number in range(_NUM_WINDOWS)]
        by_window = [_measure_window(model, window) for window in windows]
        rows += [
            {"text": name, "codec": codec}
            | {key: fmean(row[codec][key] for row in by_window) for key in by_window[0][codec]}
            for codec in BUILTIN_CODECS
        ]
    return rows


@torch.inference_mode()
def _measure_window(model: Any, ids: list[int]) -> dict[str, dict[str, float]]:
    """By codec."""
    prompt = torch.tensor([ids[:_NUM_PROMPT]])
    cache = model(prompt, logits_to_keep=1, use_cache=True).past_key_values
    # Axes: layers, K and V, tokens, heads, head size.
    kv = torch.stack(
        [torch.stack((layer.keys[0], layer.values[0])).transpose(1, 2) for layer in cache.layers]
    ).to(torch.bfloat16)
    layers, _, _, heads, dim = kv.shape
    layout = PageLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
        dtype="bfloat16",
        model_digest="bench",
        rope="bench",
    )
    wanted = _continue(model, ids, kv)
    targets = torch.tensor(ids[_NUM_PROMPT + 1 :])
    rows = {}
    for name in BUILTIN_CODECS:
        decoded, ratio = _through(load_codec(name), kv, layout, ids)
        got = _continue(model, ids, decoded)
        kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
        rows[name] = {
            "ratio": ratio,
            "kl": max(0.0, float(kl)),
            "top1": float((wanted.argmax(-1) == got.argmax(-1)).double().mean()),
            "perplexity": float(_perplexity(got, targets)),
            "perplexity_untouched": float(_perplexity(wanted, targets)),
        }
    return rows


def _through(
    codec: Codec, kv: torch.Tensor, layout: PageLayout, ids: list[int]
) -> tuple[torch.Tensor, float]:
    """The prompt's KV after the codec, and how many times smaller its blobs are."""
    keys = Namespace(bytes(32), layout, codec.fidelity).chain(ids[:_NUM_PROMPT])
    decoded = torch.empty_like(kv)
    num_stored = 0
    for key in keys:
        tokens = slice(key.index * PAGE_TOKENS, (key.index + 1) * PAGE_TOKENS)
        page = kv[:, :, tokens].contiguous().view(torch.uint8).numpy().reshape(-1)
        blob = encode_page(key, page, layout, codec, created_ms=0)
        out = np.empty_like(page)
        decode_page(blob, key, layout, {codec.codec_id: codec}, out)
        decoded[:, :, tokens] = torch.from_numpy(out).view(torch.bfloat16).view(layout.shape)
        num_stored += len(blob)
    return decoded, len(keys) * layout.nbytes / num_stored


def _continue(model: Any, ids: list[int], kv: torch.Tensor) -> torch.Tensor:
    """[continued - 1, vocabulary] log probabilities, float64."""
    cache = DynamicCache()
    for number, layer in enumerate(kv.float()):
        keys, values = layer.transpose(1, 2).unsqueeze(1).contiguous()
        cache.update(keys, values, number)
    rest = torch.tensor([ids[_NUM_PROMPT:-1]])
    logits = model(rest, past_key_values=cache, use_cache=True).logits[0]
    return logits.double().log_softmax(-1)


def _perplexity(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (-log_probs.gather(1, targets[:, None]).mean()).exp()
