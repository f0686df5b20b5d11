"""A config as Ray Serve's deployment file."""

import yaml
from pydantic import SecretStr
from ray.serve.schema import ServeDeploySchema

from cluster.config import AutoscaleConfig, ClusterConfig, PoolConfig, PoolsConfig, ServerConfig
from cluster.config_loader import parse_config
from cluster.manifest import render
from cluster.serve_app import IMPORT_PATH
from deployments.config import AuthConfig, DraftPoolConfig, TenantConfig
from deployments.grpc_servicers import GRPC_SERVICERS
from kv_store.config import KVStoreConfig, SsdTierConfig, ValkeyTierConfig

SECRETS = ("s3cret-of-the-cluster", "key-of-a", "hidden-password", "pool-secret")


def full_config(tmp_path) -> ClusterConfig:
    tenant = TenantConfig(name="a", api_keys=(SecretStr(SECRETS[1]),))
    return ClusterConfig(
        app_name="chat",
        cache_dir=tmp_path,
        auth=AuthConfig(tenants=(tenant,), cluster_secret=SecretStr(SECRETS[0])),
        draft=DraftPoolConfig(secret=SecretStr(SECRETS[3])),
        kv=KVStoreConfig(
            codec="int8",
            tiers=(
                ValkeyTierConfig(url=SecretStr(f"redis://:{SECRETS[2]}@host:6379/0")),
                SsdTierConfig(root=tmp_path / "ssd"),
            ),
        ),
        pools=PoolsConfig(
            target=PoolConfig(
                num_gpus=1, labels={"pool": "target"}, autoscaling=AutoscaleConfig(max_replicas=3)
            ),
            draft=None,
        ),
        server=ServerConfig(http_port=8100),
    )


def test_the_file_is_what_ray_serve_accepts(tmp_path):
    loaded = yaml.safe_load(render(full_config(tmp_path)).to_yaml())
    schema = ServeDeploySchema.model_validate(loaded)
    assert schema.http_options.port == 8100
    assert schema.applications[0].import_path == IMPORT_PATH
    assert loaded["grpc_options"]["grpc_servicer_functions"] == list(GRPC_SERVICERS)


def test_secrets_are_left_out_and_the_variables_for_them_named(tmp_path):
    manifest = render(full_config(tmp_path))
    text = manifest.to_yaml()
    assert not any(secret in text for secret in (*SECRETS, "****"))
    assert set(manifest.secret_variables) == {
        "PACELINE_AUTH__CLUSTER_SECRET",
        "PACELINE_AUTH__TENANTS",
        "PACELINE_DRAFT__SECRET",
        "PACELINE_KV__TIERS",
    }
    assert all(name in text for name in manifest.secret_variables)


def test_what_was_rendered_and_the_named_variables_give_the_config_back(tmp_path):
    config = full_config(tmp_path)
    manifest = render(config)
    tiers = [
        {"kind": "valkey", "url": f"redis://:{SECRETS[2]}@host:6379/0"},
        {"kind": "ssd", "root": str(tmp_path / "ssd")},
    ]
    environment = {
        "PACELINE_AUTH__CLUSTER_SECRET": SECRETS[0],
        "PACELINE_AUTH__TENANTS": yaml.safe_dump([{"name": "a", "api_keys": [SECRETS[1]]}]),
        "PACELINE_DRAFT__SECRET": SECRETS[3],
        "PACELINE_KV__TIERS": yaml.safe_dump(tiers),
    }
    assert environment.keys() == set(manifest.secret_variables)
    arguments = manifest.serve_config["applications"][0]["args"]
    again = parse_config(arguments, environment)
    assert again == config.model_copy(update={"server": again.server})


def test_a_list_without_secrets_keeps_the_kinds_of_its_items(tmp_path):
    config = ClusterConfig(kv=KVStoreConfig(tiers=(SsdTierConfig(root=tmp_path),)))
    manifest = render(config)
    assert manifest.secret_variables == ()
    arguments = manifest.serve_config["applications"][0]["args"]
    assert arguments == {"kv": {"tiers": [{"kind": "ssd", "root": str(tmp_path)}]}}
    assert parse_config(arguments, {}).kv == config.kv


def test_defaults_are_not_written():
    assert render(ClusterConfig()).serve_config["applications"][0]["args"] == {}
