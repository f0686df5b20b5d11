"""The committed stubs are exactly what ``make protos`` generates."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

PROTOS = sorted(Path("protos").glob("*.proto"))
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("protos")
    # protoc looks for the mypy plugin on PATH; an environment need not be activated.
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    outputs = ("--python_out", "--grpc_python_out", "--mypy_out", "--mypy_grpc_out")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", "."]
        + [f"{option}={folder}" for option in outputs]
        + [str(proto) for proto in PROTOS],
        check=True,
        env={**os.environ, "PATH": path},
        timeout=60,
    )
    return {
        str(file.relative_to(folder)): file.read_text(encoding="utf-8")
        for file in folder.rglob("*.py*")
    }


def test_there_are_contracts() -> None:
    assert {proto.name for proto in PROTOS} >= {"inference.proto", "draft.proto"}


def test_stubs_are_up_to_date(generated: Mapping[str, str]) -> None:
    committed = {
        str(file): file.read_text(encoding="utf-8")
        for suffix in SUFFIXES
        for file in Path("protos").glob(f"*{suffix}")
    }
    assert sorted(committed) == sorted(generated)
    assert [name for name in generated if generated[name] != committed[name]] == []
