import json
from contextlib import closing

import pytest

from cluster.commands import kv
from kv_store import KVStoreConfig, SsdTierConfig, build_page_store
from tests.kv_pages import make_chain, make_layout, make_page

LAYOUT = make_layout()
OURS, THEIRS = make_chain(LAYOUT, 5), make_chain(make_layout(model_digest="other"), 2)


@pytest.fixture
def root(tmp_path):
    tier = SsdTierConfig(root=tmp_path / "ssd", budget_bytes=1 << 22, segment_bytes=1 << 20)
    store = build_page_store(KVStoreConfig(tiers=(tier,)), LAYOUT)
    with closing(store):
        for index, key in enumerate(OURS + THEIRS):
            store.save(key, make_page(LAYOUT, index))
        assert store.flush(20)
        yield tmp_path / "ssd"  # while its owner uses it


@pytest.fixture
def config(root):
    path = root.parent / "c.yaml"
    path.write_text(f"kv: {{tiers: [{{kind: ssd, root: {root}}}]}}\n")
    return path


def test_ls_sums_up_each_namespace(config, capsys):
    kv.ls(config, None, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    found = [(row["namespace"], row["num_pages"]) for row in rows]
    assert found == [(OURS[0].namespace_id.hex(), 5), (THEIRS[0].namespace_id.hex(), 2)]
    assert all(row["num_bytes"] > row["num_pages"] * LAYOUT.nbytes for row in rows)


def test_verify_finds_the_one_damaged_page_and_leaves_the_folder_as_it_is(config, root, capsys):
    kv.verify(config, None, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"pages": 7, "problems": []}
    [segment] = root.glob("replica-0/segment-*.log")
    data = bytearray(segment.read_bytes())
    data[4096 * 3 + 500] ^= 1
    segment.write_bytes(data + b"a torn tail")
    with pytest.raises(kv.typer.Exit) as exit_info:
        kv.verify(config, None, as_json=True)
    assert exit_info.value.exit_code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["pages"] == 7
    [problem] = report["problems"]
    assert problem["page"].endswith(OURS[3].page_hash.hex())
    assert "xxh3" in problem["problem"]
    assert segment.read_bytes() == data + b"a torn tail"
