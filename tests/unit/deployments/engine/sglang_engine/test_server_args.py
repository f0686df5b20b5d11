"""What SGLang is started with."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.engine.config import EngineConfig, SGLangConfig, SpeculationConfig
from deployments.engine.errors import EngineSetupError
from deployments.engine.sglang_engine.self_check import DRAFTING, EXPECTATIONS, SHARING
from deployments.engine.sglang_engine.server_args import environment, server_args

CHECKED = [e for e in (*EXPECTATIONS, *SHARING) if e.target.endswith(":ServerArgs")]
KNOWN = tuple(name for expected in CHECKED for name in expected.fields)
FOLDER = Path("model")


def arguments(**changes):
    sglang = SGLangConfig(**changes.pop("sglang", {}))
    tier = changes.pop("tier", None)
    config = EngineConfig(kind="sglang", sglang=sglang, **changes)
    return server_args(config, FOLDER, max_model_len=512, known=KNOWN, tier=tier)


def test_settings_keep_their_meaning():
    own = arguments(num_pages=10, max_num_seqs=3, max_waiting=5, max_batch_tokens=256)
    assert own["max_total_tokens"] == 640 + 64
    assert own["max_running_requests"] == 3
    assert own["max_queued_requests"] == 5
    assert own["chunked_prefill_size"] == 256
    assert own["context_length"] == 512 + 8
    assert own["schedule_low_priority_values_first"]


def test_a_memory_fraction_takes_the_place_of_pages():
    own = arguments(sglang={"memory_fraction": 0.8})
    assert own["mem_fraction_static"] == 0.8
    assert "max_total_tokens" not in own


def test_all_that_is_passed_is_checked_for_at_the_start():
    everything = {"memory_fraction": 0.5, "attention_backend": "triton"}
    assert set(arguments()) | set(arguments(sglang=everything, tier="{}")) <= set(KNOWN)


def test_a_tier_is_attached_through_the_hierarchical_cache():
    own = arguments(tier='{"a": 1}')
    assert own["page_size"] == 64
    assert own["hicache_storage_backend_extra_config"] == '{"a": 1}'
    assert set(own) - set(arguments()) == {"page_size", "enable_hierarchical_cache"} | {
        name for name in own if name.startswith("hicache_")
    }
    with pytest.raises(EngineSetupError, match="page_size is decided by other settings"):
        arguments(sglang={"extra_args": {"page_size": 16}}, tier="{}")


def test_a_draft_is_as_wide_as_the_settings_say_and_plain_serving_knows_nothing_of_it():
    config = EngineConfig(kind="sglang", speculation=SpeculationConfig(num_draft_tokens=6))
    drafted = server_args(config, FOLDER, max_model_len=512, known=KNOWN, is_drafted=True)
    plain = server_args(config, FOLDER, max_model_len=512, known=KNOWN)
    assert drafted["speculative_num_draft_tokens"] == 7
    assert drafted["disable_overlap_schedule"]
    (checked,) = (e.fields for e in DRAFTING if e.target.endswith(":ServerArgs"))
    assert drafted.keys() - plain.keys() == set(checked)
    shared = server_args(config, FOLDER, max_model_len=512, known=KNOWN, tier="{}")
    both = server_args(config, FOLDER, max_model_len=512, known=KNOWN, is_drafted=True, tier="{}")
    assert both == drafted | shared


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, True),
        ({"speculation": SpeculationConfig(enabled=False)}, False),
        ({"sglang": SGLangConfig(tensor_parallel=2)}, True),
    ],
)
def test_drafts_are_taken_unless_they_are_switched_off(changes, takes):
    assert EngineConfig(kind="sglang", **changes).takes_drafts is takes


def test_branches_need_attention_that_reads_masks():
    with pytest.raises(ValidationError, match="draft_trees needs attention_backend: flashinfer"):
        SGLangConfig(draft_trees=True)
    with pytest.raises(ValidationError, match="draft_trees"):
        SGLangConfig(draft_trees=True, attention_backend="fa3")
    sglang = SGLangConfig(draft_trees=True, attention_backend="flashinfer")
    config = EngineConfig(kind="sglang", sglang=sglang)
    own = server_args(config, FOLDER, max_model_len=512, known=KNOWN, is_drafted=True)
    assert own["speculative_eagle_topk"] > 1
    num_slots = own["speculative_eagle_topk"] * own["speculative_num_steps"]
    assert num_slots <= own["speculative_num_draft_tokens"]


@pytest.mark.parametrize("name", ["dp_size", "pp_size"])
def test_drafts_are_for_schedulers_that_run_the_same_batches(name):
    config = EngineConfig(kind="sglang", sglang=SGLangConfig(extra_args={name: 2}))
    known = (*KNOWN, name)
    assert server_args(config, FOLDER, max_model_len=512, known=known)[name] == 2
    with pytest.raises(EngineSetupError, match=f"{name} must be 1 with drafts of the pool"):
        server_args(config, FOLDER, max_model_len=512, known=known, is_drafted=True)


def test_extra_arguments_are_passed_on():
    assert arguments(sglang={"extra_args": {"page_size": 16}})["page_size"] == 16


def test_extra_arguments_are_checked():
    with pytest.raises(EngineSetupError) as caught:
        arguments(sglang={"extra_args": {"page_sise": 16, "dtype": "float16"}})
    assert "no server argument page_sise; did you mean page_size?" in str(caught.value)
    assert "dtype is decided by other settings" in str(caught.value)


def test_the_environment_says_cpu_only_where_it_is_one():
    on_cpu = environment(EngineConfig(kind="sglang"), 4)
    assert on_cpu["SGLANG_USE_CPU_ENGINE"] == "1"
    assert on_cpu["OMP_NUM_THREADS"] == "4"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in on_cpu
    spread = EngineConfig(kind="sglang", sglang=SGLangConfig(tensor_parallel=2))
    assert environment(spread, 4)["SGLANG_CPU_OMP_THREADS_BIND"] == "0-1|2-3"
    assert environment(spread, 4)["OMP_NUM_THREADS"] == "2"
    assert environment(spread, 1)["SGLANG_CPU_OMP_THREADS_BIND"] == "0-0|1-1"
    on_gpu = environment(EngineConfig(kind="sglang", device="cuda", num_threads=2), 4)
    assert "SGLANG_USE_CPU_ENGINE" not in on_gpu
    assert on_gpu["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "sglang", "weights": "int8"},
        {"kind": "sglang", "deterministic": True},
        {"kind": "torch", "sglang": {"tensor_parallel": 2}},
    ],
)
def test_settings_of_the_other_engine_are_refused(settings):
    with pytest.raises(ValidationError, match="kind"):
        EngineConfig.model_validate(settings)


def test_pages_bound_the_context_unless_sglang_counts_them():
    assert EngineConfig(kind="sglang", num_pages=4).context_length(8192) == 256
    free = EngineConfig(kind="sglang", num_pages=4, sglang=SGLangConfig(memory_fraction=0.5))
    assert free.context_length(8192) == 4096
