"""The conversions that codecs share."""

import hashlib
from pathlib import Path

import pytest

from kv_store.codecs import halves, ranged_kernels, symmetric_kernels


@pytest.mark.parametrize("user", [ranged_kernels, symmetric_kernels], ids=lambda m: m.__name__)
def test_whoever_uses_the_conversions_changes_with_them(user):
    # A cached kernel is renewed only if its own file changes.
    source = Path(halves.__file__).read_bytes()
    assert hashlib.sha256(source).hexdigest()[:16] == user.HALVES
