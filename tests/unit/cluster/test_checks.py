"""What ``paceline doctor`` says of an engine in an environment of its own."""

import sys
from pathlib import Path

from cluster.checks import Verdict, _sglang
from cluster.config import ClusterConfig
from deployments.engine.config import EngineConfig, SGLangConfig


def findings(**sglang):
    engine = EngineConfig(kind="sglang", sglang=SGLangConfig(**sglang))
    return list(_sglang(ClusterConfig(engine=engine)))


def test_the_embedded_engine_is_not_asked_about_sglang():
    assert list(_sglang(ClusterConfig())) == []


def test_a_python_without_sglang_is_told():
    [finding] = findings(python=Path(sys.executable))
    assert finding.verdict is Verdict.FAILED
    assert "SGLang is not installed in" in finding.detail


def test_a_python_that_is_not_there_is_told(tmp_path):
    [finding] = findings(python=tmp_path / "no" / "python")
    assert finding.verdict is Verdict.FAILED
    assert finding.hint == "correct engine.sglang.python"


def test_what_the_environment_says_is_passed_on(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho a warning\necho SGLang 0.5.23\n")
    python.chmod(0o755)
    [finding] = findings(python=python)
    assert finding.verdict is Verdict.OK
    assert finding.detail == f"SGLang 0.5.23 in {python}"
