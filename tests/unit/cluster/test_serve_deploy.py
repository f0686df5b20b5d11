"""How settings get to Ray Serve's build: by a file, for Serve logs what it is told."""

from __future__ import annotations

import stat

from pydantic import SecretStr

from cluster import serve_deploy
from cluster.app import build_from_file
from cluster.config import AutoscaleConfig, ClusterConfig, PoolConfig, PoolsConfig
from cluster.serve_app import ServedApp, paceline_app
from deployments.config import AuthConfig
from kv_store.config import EmbeddedValkeyTierConfig, KVStoreConfig

SECRET = "a secret that nobody may read in a log"
SCALED = PoolConfig(autoscaling=AutoscaleConfig(max_replicas=3))


def config(**fields) -> ClusterConfig:
    auth = AuthConfig(cluster_secret=SecretStr(SECRET))
    return ClusterConfig(auth=auth, kv=KVStoreConfig(tiers=(EmbeddedValkeyTierConfig(),)), **fields)


def test_pools_that_scale_are_deployed_by_a_file_that_this_user_alone_reads(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("deployments.serve_compat.apply_config", told.extend)
    scaled = config(pools=PoolsConfig(target=SCALED))
    serve_deploy.deploy(paceline_app(), scaled, tmp_path)
    (application,) = told
    assert SECRET not in str(application)
    assert set(application["autoscaling_policy"]["policy_kwargs"]["pools"]) == {"target"}
    assert application["import_path"].rpartition(":")[2] == build_from_file.__name__
    (path,) = tmp_path.iterdir()
    assert application["args"] == {"file": str(path)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ClusterConfig.model_validate_json(path.read_text()) == scaled
    # Other settings are another file, for Serve replaces replicas where its arguments change.
    serve_deploy.deploy(paceline_app(), scaled.model_copy(update={"app_name": "b"}), tmp_path)
    assert len({each["args"]["file"] for each in told}) == 2


def test_other_applications_are_deployed_as_code(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(serve_deploy, "_deploy_code", lambda _, config: built.append(config))
    fixed, scaled = config(), config(pools=PoolsConfig(target=SCALED))
    serve_deploy.deploy(paceline_app(), fixed, tmp_path)
    own = ServedApp(build=paceline_app().build, grpc_servicer_functions=())
    serve_deploy.deploy(own, scaled, tmp_path)
    assert built == [fixed, scaled]
    assert list(tmp_path.iterdir()) == []
