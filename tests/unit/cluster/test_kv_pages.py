import json
import time
from contextlib import closing

import pytest

from cluster.commands import kv
from cluster.errors import ConfigError
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


def held(config, capsys):
    kv.ls(config, None, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    return {row["namespace"]: row["num_pages"] for row in rows}


def drop(config, capsys, **options):
    kv.drop(config, None, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_drop_says_what_it_would_do_and_does_it_only_when_told(config, capsys):
    ours, theirs = OURS[0].namespace_id.hex(), THEIRS[0].namespace_id.hex()
    for yes, left in ((False, {ours: 5, theirs: 2}), (True, {ours: 5})):
        report = drop(config, capsys, namespace=theirs[:6].upper(), yes=yes)
        assert report["dropped"] is yes
        assert [(row["namespace"], row["num_pages"]) for row in report["pages"]] == [(theirs, 2)]
        assert held(config, capsys) == left
    assert drop(config, capsys, namespace=theirs, yes=True)["pages"] == []
    kv.verify(config, None, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"pages": 5, "problems": []}


def test_drop_by_age_leaves_what_was_written_later(config, capsys, monkeypatch):
    assert drop(config, capsys, older_than=1.0, yes=True)["pages"] == []
    now = time.time()
    monkeypatch.setattr(kv.time, "time", lambda: now + 3700)
    assert sum(row["num_pages"] for row in drop(config, capsys, older_than=1.0)["pages"]) == 7
    drop(config, capsys, older_than=1.0, namespace=OURS[0].namespace_id.hex(), yes=True)
    assert held(config, capsys) == {THEIRS[0].namespace_id.hex(): 2}


def test_drop_wants_to_be_told_which(config, capsys):
    with pytest.raises(ConfigError, match="which pages"):
        kv.drop(config, None)
    kv.drop(config, None, everything=True, yes=True)
    assert "7 pages dropped" in capsys.readouterr().out
    assert held(config, capsys) == {}


def test_a_replica_that_runs_finds_a_miss_and_writes_the_page_again(tmp_path, capsys):
    tier = SsdTierConfig(root=tmp_path / "ssd", budget_bytes=1 << 22, segment_bytes=1 << 20)
    path = tmp_path / "c.yaml"
    path.write_text(f"kv: {{tiers: [{{kind: ssd, root: {tier.root}}}]}}\n")
    with closing(build_page_store(KVStoreConfig(tiers=(tier,)), LAYOUT)) as store:

        def save_and_load():
            for index, key in enumerate(OURS):
                store.save(key, make_page(LAYOUT, index))
            assert store.flush(20)
            return len(store.load(OURS, timeout_s=20).result().pages)

        assert save_and_load() == 5
        drop(path, capsys, everything=True, yes=True)
        assert store.load(OURS, timeout_s=20).result().pages == ()
        assert save_and_load() == 5
        assert store.stats().tiers["ssd"].num_corrupt == 0
