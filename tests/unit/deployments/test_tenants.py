from __future__ import annotations

import hashlib
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from deployments.config import AuthConfig, TenantConfig
from deployments.errors import AuthenticationError
from deployments.tenants import TenantDirectory, derive_tenant_key

SECRET = "a cluster secret of some length"


def directory() -> TenantDirectory:
    hashed = hashlib.sha256(b"key-two").hexdigest()
    return TenantDirectory(
        AuthConfig(
            cluster_secret=SecretStr(SECRET),
            tenants=(
                TenantConfig(name="one", api_keys=(SecretStr("key-one"), SecretStr("key-1b"))),
                TenantConfig(name="two", api_key_sha256=(hashed,), priority=5),
            ),
        )
    )


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Bearer key-one", "one"),
        ("bearer key-1b", "one"),
        ("Bearer key-two", "two"),
    ],
)
def test_a_key_names_its_tenant(header: str, name: str) -> None:
    tenant = directory().authenticate(header)
    assert tenant.name == name
    assert tenant.tenant_key == derive_tenant_key(SECRET, name)


@pytest.mark.parametrize(
    "header",
    [None, "", "key-one", "Basic key-one", "Bearer", "Bearer ", "Bearer key-on", "Bearer é"],
)
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(AuthenticationError):
        directory().authenticate(header)


def test_without_tenants_everyone_is_the_default_one() -> None:
    tenant = TenantDirectory(AuthConfig()).authenticate(None)
    assert (tenant.name, tenant.max_concurrent_requests) == ("default", None)
    assert len(tenant.tenant_key) == 32


def test_tenant_keys_differ_by_tenant_and_by_cluster() -> None:
    keys = {
        derive_tenant_key(secret, name) for secret in (SECRET, SECRET + "x") for name in ("a", "b")
    }
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)


def test_secrets_never_show() -> None:
    tenant = directory().authenticate("Bearer key-one")
    config = TenantConfig(name="one", api_keys=(SecretStr("key-one"),))
    assert "key-one" not in repr(config)
    assert repr(tenant.tenant_key) not in repr(tenant)


@pytest.mark.parametrize(
    "settings",
    [
        {"tenants": [{"name": "a"}], "cluster_secret": SECRET},
        {"tenants": [{"name": "a", "api_keys": ["k"]}]},
        {"tenants": [{"name": "A b", "api_keys": ["k"]}], "cluster_secret": SECRET},
        {"tenants": [{"name": "a", "api_key_sha256": ["00"]}], "cluster_secret": SECRET},
        {"tenants": [{"name": "a", "api_keys": ["k"]}] * 2, "cluster_secret": SECRET},
    ],
)
def test_incomplete_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AuthConfig.model_validate(settings)


@pytest.mark.parametrize("key", ["", " ", "a key", "key\n", "\xa0", "schl\xfcssel"])
def test_keys_that_nobody_can_send_are_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="visible ASCII"):
        TenantConfig(name="a", api_keys=(SecretStr(key),))


def test_the_digest_of_a_key_that_was_not_set_is_refused() -> None:
    with pytest.raises(ValidationError, match="empty key"):
        TenantConfig(name="a", api_key_sha256=(hashlib.sha256(b"").hexdigest(),))


@pytest.mark.parametrize(
    "same",
    [
        {"api_keys": (SecretStr("key-one"),)},
        {"api_key_sha256": (hashlib.sha256(b"key-one").hexdigest(),)},
    ],
)
def test_two_tenants_cannot_share_a_key(same: dict[str, Any]) -> None:
    tenants = (
        TenantConfig(name="one", api_keys=(SecretStr("key-one"),)),
        TenantConfig(name="two", **same),
    )
    with pytest.raises(ValidationError, match="'one' and 'two' share an API key") as caught:
        AuthConfig(cluster_secret=SecretStr(SECRET), tenants=tenants)
    assert "key-one" not in str(caught.value)
