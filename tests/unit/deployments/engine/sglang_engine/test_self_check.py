"""A SGLang that moved is found out, in every detail."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from deployments.engine.errors import EngineSetupError
from deployments.engine.sglang_engine import self_check
from deployments.engine.sglang_engine.expectations import TELLING_PAGES, TRACING, Expectation
from deployments.engine.sglang_engine.self_check import (
    DRAFTING,
    EXPECTATIONS,
    SHARING,
    check_installed,
    differences,
)


def _stand_in(expected: Expectation) -> object:
    if expected.fields:
        return SimpleNamespace(__struct_fields__=expected.fields)
    return eval(f"lambda self, {', '.join(expected.parameters)}: None")  # noqa: S307


@pytest.fixture
def modules(monkeypatch) -> dict[str, ModuleType]:
    """Modules that hold exactly what is expected, until a test changes them."""
    found: dict[str, ModuleType] = {}
    wanted: dict[str, Expectation] = {}
    for expected in (*EXPECTATIONS, *DRAFTING, *SHARING, *TELLING_PAGES, *TRACING):
        # What several of them say of one record is true of it together.
        known = wanted.get(expected.target, expected)
        fields = tuple(dict.fromkeys((*known.fields, *expected.fields)))
        wanted[expected.target] = replace(expected, fields=fields)
    for expected in wanted.values():
        name, _, path = expected.target.partition(":")
        place = found.setdefault(name, ModuleType(name))
        *parents, last = path.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                setattr(place, parent, type(parent, (), {}))
            place = getattr(place, parent)
        setattr(place, last, _stand_in(expected))
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_what_is_as_expected_differs_in_nothing(modules):
    assert modules
    assert differences() == []
    assert differences(DRAFTING) == []
    assert differences(SHARING) == []
    assert differences(TELLING_PAGES) == []
    assert differences(TRACING) == []


def test_what_only_sharing_pages_needs_is_named_apart(modules):
    storage = modules["sglang.srt.mem_cache.hicache_storage"].HiCacheStorage
    del storage.clear
    storage.batch_get_v1 = lambda self, keys, host_indices: None
    arguments = modules["sglang.srt.server_args"].ServerArgs
    arguments.__struct_fields__ = tuple(
        name for name in arguments.__struct_fields__ if name != "hicache_mem_layout"
    )
    assert differences() == []
    assert differences(SHARING) == [
        "sglang.srt.server_args:ServerArgs has no field hicache_mem_layout",
        "sglang.srt.mem_cache.hicache_storage:HiCacheStorage.batch_get_v1 takes no extra_info",
        "sglang.srt.mem_cache.hicache_storage:HiCacheStorage.clear is missing",
    ]


def test_a_missing_parameter_is_named(modules):
    engine = modules["sglang.srt.entrypoints.engine"].Engine

    def async_generate(
        self,
        input_ids,
        sampling_params,
        return_logprob,
        logprob_start_len,
        top_logprobs_num,
        stream,
        external_trace_header,
        rid,
        urgency,
    ):
        """Of a later version."""

    engine.async_generate = async_generate
    assert differences() == [
        "sglang.srt.entrypoints.engine:Engine.async_generate takes no priority",
        "sglang.srt.entrypoints.engine:Engine.async_generate takes no cache_salt",
    ]


def test_a_missing_field_method_and_module_are_named(modules, monkeypatch):
    arguments = modules["sglang.srt.server_args"].ServerArgs
    arguments.__struct_fields__ = tuple(
        name for name in arguments.__struct_fields__ if name != "tp_size"
    )
    del modules["sglang.srt.entrypoints.engine"].Engine.shutdown
    monkeypatch.setitem(sys.modules, "sglang.srt.utils.watchdog", None)
    *others, last = differences()
    assert others == [
        "sglang.srt.entrypoints.engine:Engine.shutdown is missing",
        "sglang.srt.server_args:ServerArgs has no field tp_size",
    ]
    assert last.startswith("sglang.srt.utils.watchdog cannot be imported")


def test_a_missing_class_is_told_once(modules):
    del modules["sglang.srt.entrypoints.engine"].Engine
    found = [line for line in differences() if "Engine.async_generate" in line]
    assert found == ["sglang.srt.entrypoints.engine:Engine.async_generate is missing"]


def test_an_engine_without_sglang_says_where_it_looked(monkeypatch):
    monkeypatch.setattr(self_check, "installed_version", lambda: None)
    with pytest.raises(EngineSetupError, match=r"not installed in .*engine\.sglang\.python"):
        check_installed()


def test_an_engine_with_another_sglang_names_versions_and_differences(modules, monkeypatch):
    del modules["sglang.srt.utils.watchdog"].SubprocessWatchdog.stop
    monkeypatch.setattr(self_check, "installed_version", lambda: "0.6.0")
    with pytest.raises(EngineSetupError) as caught:
        check_installed()
    assert "SGLang 0.6.0 is not the 0.5.23 that is known" in str(caught.value)
    assert "SubprocessWatchdog.stop is missing" in str(caught.value)


def test_what_only_drafts_or_the_tier_need_is_named_and_does_not_keep_from_serving(
    modules, monkeypatch, capsys
):
    del modules["sglang.srt.speculative.spec_utils"].GrammarTree.from_host
    del modules["sglang.srt.mem_cache.hicache_storage"].HiCacheStorage.clear
    monkeypatch.setattr(self_check, "installed_version", lambda: "0.5.23")
    check_installed()
    line = "sglang.srt.speculative.spec_utils:GrammarTree.from_host is missing"
    assert differences(DRAFTING) == [line]
    assert self_check.main() == 0
    said = capsys.readouterr().out.strip()
    assert said == (
        f"SGLang 0.5.23, which cannot verify drafts of the pool: {line}, which cannot share pages: "
        "sglang.srt.mem_cache.hicache_storage:HiCacheStorage.clear is missing"
    )
