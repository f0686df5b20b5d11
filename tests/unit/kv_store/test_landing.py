"""Memory that is lent and taken back."""

import threading

import numpy as np

from kv_store.landing import Landing

PATIENT_S = 10.0


def test_rows_are_filled_until_they_are_withdrawn():
    rows = np.zeros((1, 2, 3), np.uint8)
    landing = Landing(rows)
    assert landing.fill(lambda out: out.fill(1)) is rows
    landing.withdraw()
    assert landing.is_withdrawn
    assert landing.fill(lambda out: out.fill(2)) is None
    assert (rows == 1).all()


def test_withdrawing_waits_for_who_is_writing():
    rows = np.zeros((1, 2, 3), np.uint8)
    landing = Landing(rows)
    has_begun, may_end = threading.Event(), threading.Event()

    def write(out):
        has_begun.set()
        assert may_end.wait(PATIENT_S)
        out.fill(1)

    writer = threading.Thread(target=landing.fill, args=(write,))
    writer.start()
    assert has_begun.wait(PATIENT_S)
    lender = threading.Thread(target=landing.withdraw)
    lender.start()
    lender.join(0.05)
    assert lender.is_alive()
    may_end.set()
    lender.join(PATIENT_S)
    writer.join(PATIENT_S)
    assert (rows == 1).all()
    assert landing.is_withdrawn
