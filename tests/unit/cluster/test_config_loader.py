"""Settings from files and the environment, and what is said about wrong ones."""

import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.config import ClusterConfig, config_json_schema
from cluster.config_loader import load_config, parse_config
from cluster.errors import ConfigError

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "docs/examples/config").glob("*.yaml"))


def load_text(tmp_path, text: str, **environment: str) -> ClusterConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, environment)


def problems_of(tmp_path, text: str, **environment: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text, **environment)
    return tuple(line.replace(f"{tmp_path}/", "") for line in caught.value.problems)


def test_no_file_gives_the_defaults():
    assert load_config(None, {}) == ClusterConfig()


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_text(tmp_path, "# nothing yet\n") == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "engine:\n  speculation:\n    num_draft_tokns: 3\n",
            "c.yaml:3: engine.speculation.num_draft_tokns: unknown field; "
            "did you mean num_draft_tokens?",
        ),
        ("pool: {}\n", "c.yaml:1: pool: unknown field; did you mean pools?"),
        (
            "pools:\n  draft:\n    autoscaling: {min_replica: 2}\n",
            "c.yaml:3: pools.draft.autoscaling.min_replica: unknown field; "
            "did you mean min_replicas?",
        ),
        (
            "auth:\n  tenants:\n    - name: a\n      api_key: [x]\n",
            "c.yaml:4: auth.tenants[0].api_key: unknown field; did you mean api_keys?",
        ),
        (
            "kv:\n  tiers:\n    - kind: ssd\n      rot: /x\n",
            "c.yaml:4: kv.tiers[0].rot: unknown field; did you mean root?",
        ),
        (
            "pools: {target: {replicas: many}}\n",
            "c.yaml:1: pools.target.replicas: Input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        (
            "pools:\n  target:\n    autoscaling: {min_replicas: 3, max_replicas: 2}\n",
            "c.yaml:3: pools.target.autoscaling: max_replicas must not be below min_replicas",
        ),
        ("server:\n  http_port: 1\n  http_port: 2\n", "c.yaml:3: server.http_port: set twice"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line(tmp_path, text, expected):
    assert expected in problems_of(tmp_path, text)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("kv: null", "pools.prefill hands pages over through a Valkey tier"),
        ("kv: {tiers: [{kind: ssd, root: /x, budget_bytes: 536870912}]}", "through a Valkey tier"),
        ("engine: {kind: sglang}", "pools.prefill needs engine.kind torch"),
    ],
)
def test_a_prefill_pool_needs_a_way_for_its_pages(tmp_path, settings, problem):
    found = problems_of(tmp_path, f"pools: {{prefill: {{replicas: 1}}}}\n{settings}\n")
    assert problem in "".join(found)


def test_a_prefill_pool_is_off_unless_asked_for_and_never_scales_to_nothing(tmp_path):
    assert ClusterConfig().pools.prefill is None
    asked = load_text(tmp_path, "pools: {prefill: {}}\nprefill: {min_tokens: 128}\n")
    assert (asked.pools.prefill.replicas, asked.prefill.min_tokens) == (1, 128)
    scaled = "pools: {prefill: {autoscaling: {min_replicas: 0}}}\n"
    assert "prefill.autoscaling.min_replicas" in "".join(problems_of(tmp_path, scaled))


def test_a_missing_field_is_named_at_its_parents_line(tmp_path):
    [problem] = problems_of(tmp_path, "kv:\n  tiers:\n    - kind: ssd\n")
    assert problem == "c.yaml:3: kv.tiers[0].root: Field required"


def test_all_problems_are_told_at_once(tmp_path):
    assert (
        len(problems_of(tmp_path, "pool: {}\nlog_level: LOUD\nserver: {http_port: 70000}\n")) == 3
    )


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "a: [\n",
        "just words\n",
        "a: 2024-99-99\n",
        "a: &itself {b: *itself}\n",
        "[" * 5000,
    ],
)
def test_a_file_that_holds_no_mapping_is_refused(tmp_path, text):
    [problem] = problems_of(tmp_path, text)
    assert problem.startswith("c.yaml: ")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml", {})


def test_the_environment_wins_over_the_file_and_is_read_as_yaml(tmp_path):
    config = load_text(
        tmp_path,
        "engine: {max_num_seqs: 3, num_pages: 99}\n",
        PACELINE_ENGINE__MAX_NUM_SEQS="7",
        PACELINE_POOLS__DRAFT="null",
        PACELINE_SERVER__HTTP_PORT="0",
    )
    assert config.engine.max_num_seqs == 7
    assert config.engine.num_pages == 99
    assert config.pools.draft is None
    assert config.server.http_port == 0


@pytest.mark.parametrize(
    "secret",
    ["my secret #1 that is really long", "12345678901234567890123456789012", "[:{", "null", "'q'"],
)
def test_a_secret_of_the_environment_is_taken_as_it_is(tmp_path, secret):
    config = load_text(
        tmp_path, "", PACELINE_AUTH__CLUSTER_SECRET=secret, PACELINE_DRAFT__SECRET=secret
    )
    assert config.auth.cluster_secret.get_secret_value() == secret
    assert config.draft.secret.get_secret_value() == secret


def test_a_wrong_variable_is_named(tmp_path):
    [problem] = problems_of(tmp_path, "", PACELINE_ENGINE__MODLE="x")
    assert problem == "PACELINE_ENGINE__MODLE: engine.modle: unknown field; did you mean model?"


def test_variables_of_the_command_line_and_of_others_are_no_settings(tmp_path):
    config = load_text(
        tmp_path, "", PACELINE_CONFIG="x", PACELINE_API_KEY="y", PATH="/bin", PACELINED="z"
    )
    assert config == ClusterConfig()


def test_a_rendered_config_is_completed_by_the_pods_environment():
    config = parse_config(
        {"ingress": {"max_choices": 2}},
        {
            "PACELINE_AUTH__CLUSTER_SECRET": "s" * 32,
            "PACELINE_AUTH__TENANTS": json.dumps([{"name": "a", "api_keys": ["k"]}]),
        },
    )
    assert config.auth.tenants[0].name == "a"
    assert config.ingress.max_choices == 2


def test_merging_the_environment_leaves_the_given_settings_alone():
    given = {"engine": {"num_pages": 9}}
    parse_config(given, {"PACELINE_ENGINE__NUM_PAGES": "8"})
    assert given == {"engine": {"num_pages": 9}}


def test_a_secret_never_shows_in_a_message(tmp_path):
    told = problems_of(
        tmp_path,
        "auth: {cluster_secret: tooshort77, tenants: [{name: a, api_keys: [hush-hush]}]}\n",
        PACELINE_KV__TIERS="[{kind: valkey, url: 'http://user:hidden9@host'}]",
    )
    assert len(told) == 2
    for secret in ("tooshort77", "hush-hush", "hidden9"):
        assert not any(secret in problem for problem in told)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_and_fits_the_schema(path):
    environment = {"VALKEY_URL": "redis://x"} if "external" in path.name else {}
    config = load_config(path, environment)
    assert config != ClusterConfig()
    jsonschema.validate(yaml.safe_load(path.read_text()), config_json_schema())


def test_the_examples_are_there():
    names = {path.stem for path in EXAMPLES}
    assert names >= {"laptop", "two-tenants", "gpu", "external-valkey"}


def test_the_schema_refuses_what_the_loader_refuses():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"engin": {}}, config_json_schema())


def test_the_pages_folder_lies_below_the_chosen_cache(tmp_path):
    config = ClusterConfig(cache_dir=tmp_path)
    assert [str(tier.root) for tier in config.kv.tiers if tier.kind == "ssd"] == [
        os.fspath(tmp_path / "kv")
    ]
