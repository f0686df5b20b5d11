from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from deployments.config import TracingConfig
from deployments.tracing import Tracing, traceparent_of

if TYPE_CHECKING:
    from pathlib import Path

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_spans_are_children_of_the_caller_and_of_each_other(tmp_path: Path) -> None:
    tracing = Tracing(TracingConfig(exporter="file", file_path=tmp_path / "spans"), "svc")
    with tracing.span("root", PARENT, {"a": 1}) as root:
        inner_parent = traceparent_of(root)
        with tracing.span("inner", inner_parent, {}):
            pass
    with pytest.raises(KeyError), tracing.span("broken", "not a traceparent", {}):
        raise KeyError("secret prompt")
    tracing.close()
    (path,) = (tmp_path / "spans").iterdir()
    text = path.read_text()
    spans = {span["name"]: span for span in map(json.loads, text.splitlines())}
    assert spans["root"]["parent_id"] == "0xb7ad6b7169203331"
    assert spans["inner"]["parent_id"] == spans["root"]["context"]["span_id"]
    assert spans["inner"]["context"]["trace_id"] == "0x0af7651916cd43dd8448eb211c80319c"
    assert spans["root"]["resource"]["attributes"]["service.name"] == "svc"
    assert spans["broken"]["parent_id"] is None
    assert spans["broken"]["status"] == {"status_code": "ERROR", "description": "KeyError"}
    assert "secret" not in text


def test_off_means_off() -> None:
    tracing = Tracing(TracingConfig(), "svc")
    with tracing.span("root", None, {}) as span:
        assert not span.is_recording()
        assert traceparent_of(span) is None
    tracing.close()


def test_a_caller_that_does_not_sample_is_respected(tmp_path: Path) -> None:
    tracing = Tracing(TracingConfig(exporter="file", file_path=tmp_path), "svc")
    with tracing.span("root", PARENT[:-1] + "0", {}) as span:
        assert not span.is_recording()
    tracing.close()


def test_a_file_exporter_needs_a_folder() -> None:
    with pytest.raises(ValidationError, match="file_path"):
        TracingConfig(exporter="file")
