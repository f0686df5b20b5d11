"""Deterministic mode: a row has the same bits whatever is computed beside it, and however."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from deployments.engine.config import TorchEngineConfig
from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from tests.unit.deployments.engine.torch_engine.tiny_models import batch_of, loaded_model

LENGTH = 200
WIDTHS = (1, 2, 3, 4, 5, 8, 13, 16, 33, 64, 65, 150)
TEXTS = torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(5)).tolist()
SLOTS = torch.randperm(16 * 64, generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(params=[1, 2, 3], autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Machine:
    """A pool and the rows that are in it; texts lie in slots without order."""

    def __init__(self, loaded):
        self.memory = KVCache(loaded.config, 16, dtype=loaded.model.dtype)
        self._runner = ModelRunner(loaded.model, loaded.config, self.memory, is_deterministic=True)

    def features(self, text, start, end, layers):
        """Logits of these tokens, while features are taken as well."""
        slots = self.slots(text)
        part = (TEXTS[text][start:end], range(start, end), slots[start:end], slots[:start], None)
        return self._runner.forward_with_features(batch_of(part), layers).logits

    def slots(self, text):
        return SLOTS[text * LENGTH : (text + 1) * LENGTH]

    def rows(self, text, end):
        """Bits of the keys and values of a text's leading tokens."""
        slots = torch.tensor(self.slots(text)[:end])
        return torch.stack((self.memory.k[:, slots], self.memory.v[:, slots]))

    def read(self, *parts):
        """Parts: (text, first token, last token); logits of all their tokens."""
        return self._runner.forward(
            batch_of(
                *(
                    (TEXTS[t][a:b], range(a, b), self.slots(t)[a:b], self.slots(t)[:a], None)
                    for t, a, b in parts
                )
            )
        )

    def read_tree(self, text, start, parents):
        """Verify a tree behind ``start`` tokens whose nodes all hold the text's own tokens."""
        depths, paths = [], []
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            paths.append([*(paths[parent] if parent >= 0 else []), len(paths)])
        mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
        for node, path in enumerate(paths):
            mask[node, path] = True
        tokens = [TEXTS[text][start + depth] for depth in depths]
        scratch = SLOTS[3 * LENGTH : 3 * LENGTH + len(parents)]
        positions = [start + depth for depth in depths]
        earlier = self.slots(text)[:start]
        return depths, self._runner.forward(batch_of((tokens, positions, scratch, earlier, mask)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request):
    return loaded_model(dtype=request.param)


@pytest.fixture(scope="module")
def expected(loaded):
    """Logits and rows of the first text, a token at a time on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    machine = Machine(loaded)
    logits = torch.cat([machine.read((0, i, i + 1)) for i in range(LENGTH)])
    torch.set_num_threads(before)
    return logits, machine.rows(0, LENGTH)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_changes_a_bit(width, loaded, expected):
    machine = Machine(loaded)
    parts = [(0, start, min(start + width, LENGTH)) for start in range(0, LENGTH, width)]
    logits = torch.cat([machine.read(part) for part in parts])
    assert torch.equal(logits, expected[0])
    assert torch.equal(machine.rows(0, LENGTH), expected[1])


@pytest.mark.parametrize("width", [1, 5, 65])
@pytest.mark.parametrize("layers", [(1,), (0, 2, 3), (2, 1, 2)])
def test_features_that_are_taken_change_no_bit(layers, width, loaded, expected):
    machine = Machine(loaded)
    cuts = [*range(0, LENGTH, width), LENGTH]
    logits = [machine.features(0, *cut, layers) for cut in pairwise(cuts)]
    assert torch.equal(torch.cat(logits), expected[0])
    assert torch.equal(machine.rows(0, LENGTH), expected[1])


@pytest.mark.parametrize("seed", range(4))
def test_no_company_and_no_cut_changes_a_bit(seed, loaded, expected):
    rng = random.Random(seed)  # noqa: S311
    machine = Machine(loaded)
    done = [0, 0, 0]
    logits = []
    while done[0] < LENGTH:
        parts, rows = [], 0
        for text in rng.sample(range(3), 3):
            end = min(LENGTH, done[text] + rng.choice((0, 1, 1, 2, 5, 17, 70)))
            if end > done[text]:
                parts.append((text, done[text], end))
                if text == 0:
                    mine = slice(rows, rows + end - done[text])
                rows += end - done[text]
                done[text] = end
        if parts:
            found = machine.read(*parts)
            if any(text == 0 for text, _, _ in parts):
                logits.append(found[mine])
    assert torch.equal(torch.cat(logits), expected[0])
    assert torch.equal(machine.rows(0, LENGTH), expected[1])


@pytest.mark.parametrize("parents", [(-1, 0, 1, 2), (-1, 0, 0, 1, 2, 3, 4), (-1, *range(80))])
def test_a_node_has_the_bits_of_its_path(parents, loaded, expected):
    machine = Machine(loaded)
    machine.read((0, 0, 100))
    depths, logits = machine.read_tree(0, 100, parents)
    assert torch.equal(logits, expected[0][[100 + depth for depth in depths]])


def test_what_has_no_deterministic_arithmetic_is_refused(loaded):
    with pytest.raises(ValidationError, match="deterministic arithmetic needs device: cpu"):
        TorchEngineConfig(deterministic=True, device="cuda")

    class OwnAttention(loaded.model.attention_class):
        is_standard = False

    memory = KVCache(loaded.config, 2, dtype=loaded.model.dtype)
    loaded.model.attention_class = OwnAttention
    with pytest.raises(UnsupportedModelError, match=r"engine\.deterministic.*layers of llama"):
        ModelRunner(loaded.model, loaded.config, memory, is_deterministic=True)
    del loaded.model.attention_class


def test_hidden_states_are_handed_out_without_changing_a_bit(loaded):
    batch = batch_of((TEXTS[0][:70], range(70), SLOTS[:70], [], None))
    caches = [KVCache(loaded.config, 16, dtype=loaded.model.dtype) for _ in range(2)]
    plain, tapped = (
        ModelRunner(loaded.model, loaded.config, cache, is_deterministic=True) for cache in caches
    )
    logits, features = tapped.forward_with_features(batch, (2, 0, 3))
    assert torch.equal(logits, plain.forward(batch))
    assert torch.equal(caches[0].k, caches[1].k)
    output = loaded.model(batch, KVCache(loaded.config, 16, dtype=loaded.model.dtype), (2, 0, 3))
    # Where the processor multiplies bfloat16, torch rounds between the steps of a layer too.
    for found, expected in zip(features, output.features, strict=True):
        assert (found - expected).float().norm() < 0.05 * expected.float().norm()


def test_rows_of_other_arithmetic_are_other_pages(loaded):
    memory = KVCache(loaded.config, 2, dtype=loaded.model.dtype)
    names = {
        ModelRunner(loaded.model, loaded.config, memory, is_deterministic=mode).arithmetic
        for mode in (False, True)
    }
    assert len({loaded.page_layout(name).fingerprint for name in names}) == 2
