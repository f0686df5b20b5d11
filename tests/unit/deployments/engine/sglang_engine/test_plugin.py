"""SGLang finds the plugin of the process that starts it, and of no other."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

from deployments.engine.sglang_engine import plugin


def found():
    return [point.load() for point in entry_points(group="sglang.srt.plugins")]


def test_it_is_found_once_it_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert plugin.install not in found()
    plugin.announce(tmp_path)
    assert plugin.install in found()
    assert plugin.os.environ["SGLANG_PLUGINS"] == "another,paceline"


def test_importing_it_imports_no_sglang():
    code = (
        "import sys; import deployments.engine.sglang_engine.plugin; "
        "print(any(name.split('.')[0] == 'sglang' for name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
