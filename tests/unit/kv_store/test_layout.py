from dataclasses import fields

import pytest

from kv_store.layout import PageLayout
from tests.kv_pages import make_layout

CHANGES = [
    {"num_layers": 4},
    {"num_kv_heads": 3},
    {"head_dim": 8},
    {"dtype": "bfloat16"},
    {"model_digest": "decaf"},
    {"rope": "theta=20000"},
    {"engine": "sglang"},
    {"kv_policy": "h2o"},
    {"lora_id": "a"},
    {"tp_rank": 1},
    {"tp_size": 2},
    {"page_tokens": 8},
]


def test_every_field_is_in_the_fingerprint():
    layouts = [make_layout(), *(make_layout(**change) for change in CHANGES)]
    changed = {name for change in CHANGES for name in change}
    assert changed == {field.name for field in fields(PageLayout)}
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert make_layout().fingerprint == make_layout().fingerprint


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_nbytes(dtype, size):
    assert make_layout(dtype=dtype).nbytes == 3 * 2 * 4 * 2 * 4 * size
