"""What Ray is asked for."""

import pytest
from pydantic import ValidationError
from ray.serve._private.config import ReplicaConfig
from ray.serve.config import AutoscalingConfig

from cluster.config import AutoscaleConfig, ClusterConfig, PoolConfig, PoolsConfig
from cluster.errors import ConfigError
from cluster.pools import (
    deployment_options,
    engine_threads,
    machine_resources,
    target_options,
)
from deployments.engine.config import EngineConfig, SGLangConfig, TorchEngineConfig


def test_a_fixed_pool_has_replicas_and_no_autoscaling():
    options = deployment_options(PoolConfig(replicas=3, num_cpus=2, num_gpus=0.5))
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5}


def test_an_autoscaled_pool_has_bounds_that_serve_accepts():
    pool = PoolConfig(
        replicas=9,
        autoscaling=AutoscaleConfig(
            min_replicas=2,
            max_replicas=6,
            target_ongoing_requests=5,
            upscale_delay_s=1,
            downscale_delay_s=2,
            look_back_s=3,
        ),
    )
    options = deployment_options(pool)
    assert "num_replicas" not in options
    config = AutoscalingConfig(**options["autoscaling_config"])
    # Serve would go back to initial replicas at every rolling update.
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, None, 6)
    assert config.target_ongoing_requests == 5
    # The policy waits; Serve must not wait once more.
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0, 0)
    assert config.metrics_interval_s < config.look_back_period_s == 3


def test_what_waits_for_a_pool_is_bounded():
    assert 0 < deployment_options(PoolConfig())["max_queued_requests"] < 1000
    options = deployment_options(PoolConfig(max_ongoing_requests=3, max_queued_requests=7))
    assert (options["max_ongoing_requests"], options["max_queued_requests"]) == (3, 7)


def test_resources_and_labels_place_a_pool():
    pool = PoolConfig(resources={"target_slot": 1}, labels={"paceline.io/pool": "target"})
    actor_options = deployment_options(pool)["ray_actor_options"]
    assert actor_options["resources"] == {"target_slot": 1}
    assert actor_options["label_selector"] == {"paceline.io/pool": "target"}


def test_one_machine_offers_what_all_pools_need_at_their_largest():
    pools = PoolsConfig(
        ingress=PoolConfig(num_cpus=0.5),
        target=PoolConfig(
            num_cpus=2, resources={"slot": 0.5}, autoscaling=AutoscaleConfig(max_replicas=3)
        ),
        draft=PoolConfig(replicas=2, num_cpus=1, labels={"zone": "a"}),
        prefill=PoolConfig(replicas=2, num_cpus=4),
    )
    machine = machine_resources(pools)
    assert machine.num_cpus >= 0.5 + 3 * 2 + 2 * 1 + 2 * 4
    assert isinstance(machine.num_cpus, int)
    assert machine.resources == {"slot": 2}
    assert machine.labels == {"zone": "a"}


def test_one_machine_cannot_have_two_values_of_a_label():
    pools = PoolsConfig(target=PoolConfig(labels={"p": "t"}), draft=PoolConfig(labels={"p": "d"}))
    with pytest.raises(ConfigError, match=r"pools\.draft\.labels.*'p'"):
        machine_resources(pools)


@pytest.mark.parametrize(
    ("num_cpus", "set_threads", "expected"), [(1, None, 1), (0.5, None, 1), (4, None, 4), (4, 2, 2)]
)
def test_a_replica_computes_on_the_cpus_it_asks_for(num_cpus, set_threads, expected):
    config = ClusterConfig(
        pools=PoolsConfig(target=PoolConfig(num_cpus=num_cpus)),
        engine=TorchEngineConfig(num_threads=set_threads),
    )
    assert engine_threads(config) == expected


def test_the_gpus_of_a_replica_that_needs_several_are_reserved_on_one_machine():
    sglang = SGLangConfig(tensor_parallel=4)
    engine = EngineConfig(kind="sglang", device="cuda", sglang=sglang)
    pool = PoolConfig(num_cpus=2, num_gpus=4, resources={"slot": 1}, labels={"gpu": "h200"})
    options = target_options(ClusterConfig(pools=PoolsConfig(target=pool), engine=engine))
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 4, "slot": 1}]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert options["placement_group_bundle_label_selector"] == [{"gpu": "h200"}]
    # The actor takes all of it, so that its processes see every GPU.
    assert options["ray_actor_options"]["num_gpus"] == 4
    assert "label_selector" not in options["ray_actor_options"]
    ReplicaConfig.create(
        lambda: None,
        ray_actor_options=options["ray_actor_options"],
        **{name: value for name, value in options.items() if name.startswith("placement_group")},
    )
    assert "placement_group_bundles" not in target_options(ClusterConfig())


def test_a_replica_has_as_many_gpus_as_share_its_layers():
    engine = EngineConfig(kind="sglang", device="cuda", sglang=SGLangConfig(tensor_parallel=2))
    with pytest.raises(ValidationError, match=r"tensor_parallel is 2, but .*num_gpus is 1"):
        ClusterConfig(pools=PoolsConfig(target=PoolConfig(num_gpus=1)), engine=engine)


def test_branches_over_pages_need_attention_that_can():
    sglang = SGLangConfig(draft_trees=True, attention_backend="triton")
    engine = EngineConfig(kind="sglang", device="cuda", sglang=sglang)
    with pytest.raises(ValidationError, match="draft_trees over pages of 64 tokens"):
        ClusterConfig(engine=engine)
    assert ClusterConfig(engine=engine, kv=None).engine.sglang.draft_trees


def test_target_replicas_start_in_the_python_that_holds_their_engine(tmp_path):
    pools = PoolsConfig(target=PoolConfig(num_gpus=1))
    sglang = SGLangConfig(python=tmp_path / "bin" / "python")
    config = ClusterConfig(pools=pools, engine=EngineConfig(kind="sglang", sglang=sglang))
    options = target_options(config)["ray_actor_options"]
    assert options["num_gpus"] == 1
    assert options["runtime_env"] == {"py_executable": str(tmp_path / "bin" / "python")}
    one_for_all = ClusterConfig(pools=pools)
    assert "runtime_env" not in target_options(one_for_all)["ray_actor_options"]
