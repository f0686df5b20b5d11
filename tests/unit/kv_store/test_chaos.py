import pytest

from kv_store.page_format import decode_page
from tests.chaos.kv.tier_faults import DISKS, PLANS, run_fault

NUM_OPERATIONS = 3000
NUM_CHAINS = 8


@pytest.mark.parametrize("fault", [*PLANS, *DISKS])
def test_no_fault_gives_a_wrong_page_or_reaches_the_engine(fault, tmp_path):
    row = run_fault(fault, NUM_OPERATIONS, tmp_path, NUM_CHAINS)
    assert row["page_operations"] >= NUM_OPERATIONS
    assert row["pages_served"] > 0
    assert row["faults"] > 0
    assert (row["wrong_pages"], row["raised"], row["errors"]) == (0, 0, [])
    assert row["recovered"]


def test_a_store_that_serves_without_a_look_is_found_out(monkeypatch, tmp_path):
    def careless(blob, key, layout, codecs, out):
        try:
            decode_page(blob, key, layout, codecs, out)
        except Exception:  # noqa: BLE001 - what the test is about
            out[:] = 0

    monkeypatch.setattr("kv_store.chain_loader.decode_page", careless)
    assert run_fault("corrupt", NUM_OPERATIONS, tmp_path, NUM_CHAINS)["wrong_pages"] > 0


def test_a_guard_with_a_hole_is_found_out(monkeypatch, tmp_path):
    monkeypatch.setattr("kv_store.tiers.guarded.TierUnavailableError", ZeroDivisionError)
    assert run_fault("fail", NUM_OPERATIONS, tmp_path, NUM_CHAINS)["raised"] > 0
