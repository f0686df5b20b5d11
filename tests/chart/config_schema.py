"""The part of the chart's values schema that is the cluster's own configuration.

``python -m tests.chart.config_schema`` writes it into the chart; a test fails while it differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config import config_json_schema

SCHEMA_PATH = Path("k8s/chart/values.schema.json")

_PREFIX = "config."
_SET_BY_THE_CHART = ("server", "auth")
_TIERS = ("ValkeyTierConfig", "SsdTierConfig", "PeersTierConfig")
_KNOWN_OF_A_TIER = ("kind", "name", "url", "is_cluster", "sentinels", "root", "budget_bytes")


def with_config_schema(values_schema: dict[str, Any]) -> dict[str, Any]:
    """A values schema whose ``config`` is what a configuration file may hold.

    What the chart sets itself is left out, so that a value cannot be given and then overwritten;
    so are secrets, which come through the environment.
    """
    schema = json.loads(json.dumps(config_json_schema()).replace("#/$defs/", f"#/$defs/{_PREFIX}"))
    definitions = schema.pop("$defs")
    del definitions["PoolConfig"]["properties"]["labels"]
    del definitions["KVStoreConfig"]["properties"]["tiers"]
    del definitions["SpeculationConfig"]["properties"]["pool_tls"]
    for definition in definitions.values():
        _drop_secrets(definition)
    for tier in _TIERS:
        _drop_known(definitions[tier])
    for name in _SET_BY_THE_CHART:
        del schema["properties"][name]
    schema.pop("$schema")
    own = {
        name: definition
        for name, definition in values_schema["$defs"].items()
        if not name.startswith(_PREFIX)
    }
    used = _reachable(schema, definitions) | set(_TIERS)
    return values_schema | {
        "$defs": own | {_PREFIX + name: definitions[name] for name in sorted(used)},
        "properties": values_schema["properties"] | {"config": schema},
    }


def _drop_secrets(definition: dict[str, Any]) -> None:
    properties = definition.get("properties", {})
    secrets = [name for name, field in properties.items() if '"password"' in json.dumps(field)]
    for name in secrets:
        del properties[name]


def _drop_known(tier: dict[str, Any]) -> None:
    """Leave out what the chart knows of a tier from other values."""
    for name in _KNOWN_OF_A_TIER:
        tier["properties"].pop(name, None)
    tier.pop("required", None)


def _reachable(schema: dict[str, Any], definitions: dict[str, Any]) -> set[str]:
    """Names of the definitions that a schema refers to, directly or not."""
    found: set[str] = set()
    todo = [schema]
    while todo:
        text = json.dumps(todo.pop())
        names = {name for name in definitions if f'"#/$defs/{_PREFIX}{name}"' in text}
        todo += [definitions[name] for name in names - found]
        found |= names
    return found


def main() -> None:
    """Write the schema into the chart."""
    schema = with_config_schema(json.loads(SCHEMA_PATH.read_text(encoding="utf-8")))
    SCHEMA_PATH.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
