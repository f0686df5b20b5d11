"""The conversions that codecs share."""

import hashlib
from pathlib import Path

import pytest

from kv_store.codecs import halves, range_kernels, ranged_kernels, symmetric_kernels


@pytest.mark.parametrize(
    ("used", "digest"),
    [
        (halves, range_kernels.HALVES),
        (halves, ranged_kernels.HALVES),
        (halves, symmetric_kernels.HALVES),
        (range_kernels, ranged_kernels.RANGES),
    ],
)
def test_whoever_uses_the_conversions_changes_with_them(used, digest):
    # A cached kernel is renewed only if its own file changes.
    source = Path(used.__file__).read_bytes()
    assert hashlib.sha256(source).hexdigest()[:16] == digest
