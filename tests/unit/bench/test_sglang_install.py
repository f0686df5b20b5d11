"""What the builder of SGLang's environment says where it cannot build it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.sglang.install import InstallError, check_room, run_pip


def test_a_disk_without_room_is_named_before_anything_is_installed(tmp_path: Path) -> None:
    check_room(tmp_path / "build" / "venv", needed=1)
    with pytest.raises(InstallError, match=r"needs 1000000000000 GB, and .* has [0-9.]+ GB free"):
        check_room(tmp_path / "build" / "venv", needed=10**21)
    assert not (tmp_path / "build").exists()


def test_an_index_out_of_reach_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InstallError, match=r"pip ended with 1.*PIP_INDEX_URL"):
        run_pip(Path(sys.executable), "--dry-run", "no-such-package-of-anybody==1")
    assert "No matching distribution" in capfd.readouterr().err
