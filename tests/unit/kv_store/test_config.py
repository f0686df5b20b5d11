import pickle

import pytest
from pydantic import ValidationError

import kv_store
from kv_store import KVStoreConfig, KVStoreError, ValkeyTierConfig
from kv_store import config as config_module

URL = "redis://:geheim@10.0.0.1:6379/0"


def test_a_file_chooses_tiers_by_kind():
    config = KVStoreConfig.model_validate(
        {
            "codec": "int8",
            "tiers": [
                {"kind": "valkey", "url": URL},
                {"kind": "ssd", "root": "pages", "budget_bytes": 1 << 30},
            ],
        }
    )
    assert [tier.kind for tier in config.tiers] == ["valkey", "ssd"]


def test_the_url_is_not_shown():
    config = KVStoreConfig(tiers=(ValkeyTierConfig(url=URL),))
    assert "geheim" not in repr(config) + str(config) + config.model_dump_json()
    assert config.tiers[0].url.get_secret_value() == URL


@pytest.mark.parametrize(
    "bad",
    [
        {"tiers": []},
        {"tiers": [{"kind": "memory"}, {"kind": "memory"}]},
        {"tiers": [{"kind": "valkey", "url": "http://x"}]},
        {"tiers": [{"kind": "tape"}]},
        {"tiers": [{"kind": "ssd", "root": "x", "budget_bytes": 1 << 20}]},
        {"breaker": {"open_s": 5, "max_open_s": 1}},
        {"write_back": {"max_pages": 0}},
        {"no_such_field": 1},
    ],
)
def test_nonsense_is_refused(bad):
    with pytest.raises(ValidationError):
        KVStoreConfig.model_validate(bad)


def test_every_field_is_documented():
    models = [
        model
        for model in vars(config_module).values()
        if isinstance(model, type) and issubclass(model, config_module.BaseModel)
    ]
    undocumented = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert len(models) > 7
    assert undocumented == []


def test_errors_survive_pickling():
    errors = [
        error
        for error in vars(kv_store.errors).values()
        if isinstance(error, type) and issubclass(error, KVStoreError)
    ]
    assert len(errors) == 8
    for error in errors:
        copy = pickle.loads(pickle.dumps(error("what went wrong")))  # noqa: S301
        assert type(copy) is error
        assert str(copy) == "what went wrong"


def test_exported_names_exist():
    assert all(hasattr(kv_store, name) for name in kv_store.__all__)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"url": "redis://a:1,b:2"}, "set is_cluster"),
        ({"url": "unix:///run/valkey", "is_cluster": True}, "unix://"),
        ({"url": "redis://a", "is_cluster": True, "sentinels": "redis://b"}, "not both"),
        ({"url": "redis://a", "sentinels": "http://b"}, "redis://"),
        ({"url": "redis://a", "sentinels": "redis://b:x"}, "HOST:PORT"),
        ({"url": "redis://a:70000"}, "HOST:PORT"),
        ({"url": "redis://a/pages"}, "HOST:PORT/DB"),
        ({"url": "redis://a?db=x"}, "option"),
        ({"url": "redis://a?foo=bar"}, "option"),
        ({"url": "redis://a?ssl_ca_certs=/ca.crt"}, "option"),
    ],
)
def test_addresses_that_cannot_be_meant_are_refused(fields, problem):
    with pytest.raises(ValidationError, match=problem):
        ValkeyTierConfig(**fields)


@pytest.mark.parametrize("mark", ["/", "?", "#", "["])
@pytest.mark.parametrize("before", ["geheim", "1"])
def test_a_password_that_breaks_its_url_is_refused_without_a_word_of_it(before, mark):
    url = f"redis://:{before}{mark}wort@10.0.0.1:6379/0"
    with pytest.raises(ValidationError) as caught:
        ValkeyTierConfig(url=url)
    [problem] = caught.value.errors(include_input=False, include_context=False)
    assert "geheim" not in str(problem)
    assert "wort" not in str(problem)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://10.0.0.1",
        "redis://[::1]:6379/2",
        "rediss://user:a%2F%3F@b,c@valkey:6380/0?ssl_ca_certs=/ca.crt&ssl_cert_reqs=required",
        "unix:///run/valkey.sock?db=1",
    ],
)
def test_addresses_of_every_kind_are_taken(url):
    assert ValkeyTierConfig(url=url).url.get_secret_value() == url
