"""Reads a ClusterConfig from YAML and the environment, and says precisely what is wrong in it.

``PACELINE_ENGINE__MODEL=...`` overrides ``engine.model``: two underscores go one level down, and
the value is read as YAML, save a secret's, which is taken as it is. The environment wins over the
file.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from cluster.config import ClusterConfig
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ENV_PREFIX = "PACELINE_"
RESERVED_VARIABLES = frozenset(
    {"PACELINE_CONFIG", "PACELINE_CLUSTER_ID", "PACELINE_STATE_DIR", "PACELINE_API_KEY"}
)
"""Variables of the command line, which are no settings."""

_Path = tuple[str | int, ...]


def load_config(path: Path | None, environment: Mapping[str, str] | None = None) -> ClusterConfig:
    """Read settings from a file and the environment; what neither sets has its default.

    Args:
        path: a YAML file, or None for defaults and environment only.
        environment: ``os.environ`` by default.

    Raises:
        ConfigError: a file that cannot be read, or settings that are wrong; lists every problem.
    """
    settings: dict[str, Any] = {}
    sources: dict[_Path, str] = {}
    if path is not None:
        settings = _read_yaml(path, sources)
    _merge_environment(settings, os.environ if environment is None else environment, sources)
    return _validate(settings, sources)


def parse_config(
    settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> ClusterConfig:
    """Settings that are already in memory, with the environment's overrides applied.

    A pod's secrets arrive this way: they are in its environment and not in the rendered settings.

    Args:
        settings: nested, as in a YAML file.
        environment: ``os.environ`` by default.

    Raises:
        ConfigError: settings are wrong; lists every problem.
    """
    sources: dict[_Path, str] = {}
    merged = dict(settings)
    _merge_environment(merged, os.environ if environment is None else environment, sources)
    return _validate(merged, sources)


def _read_yaml(path: Path, sources: dict[_Path, str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        settings = yaml.safe_load(text)
        problems: list[str] = []
        _note_lines(node, (), path, sources, problems)
    except OSError as error:
        raise ConfigError((f"{path}: {error.strerror or error}",)) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError((f"{path}: not valid YAML: {error}",)) from error
    except RecursionError:
        raise ConfigError((f"{path}: nested too deeply, or an alias holds itself",)) from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError((f"{path}: the file must hold a mapping of settings",))
    if problems:
        raise ConfigError(tuple(problems))
    return settings


def _note_lines(
    node: yaml.Node | None, at: _Path, path: Path, sources: dict[_Path, str], problems: list[str]
) -> None:
    """Remember the line of every setting; YAML itself would let a repeated key win in silence."""
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            where = f"{path}:{key_node.start_mark.line + 1}"
            if key in keys:
                problems.append(f"{where}: {_dotted((*at, key))}: set twice")
            keys.add(key)
            sources[(*at, key)] = where
            _note_lines(value_node, (*at, key), path, sources, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            sources[(*at, index)] = f"{path}:{item.start_mark.line + 1}"
            _note_lines(item, (*at, index), path, sources, problems)


def _merge_environment(
    settings: dict[str, Any], environment: Mapping[str, str], sources: dict[_Path, str]
) -> None:
    for name, text in sorted(environment.items()):
        if not name.startswith(ENV_PREFIX) or name in RESERVED_VARIABLES:
            continue
        path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        value = text if _is_secret(path) else _parse_variable(name, text)
        parent = settings
        for key in path[:-1]:
            child = parent.get(key)
            parent[key] = dict(child) if isinstance(child, dict) else {}
            parent = parent[key]
        parent[path[-1]] = value
        sources[path] = name


def _parse_variable(name: str, text: str) -> Any:  # noqa: ANN401 - any YAML
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Without its text: the value may hold a secret.
        raise ConfigError((f"{name}: not valid YAML",)) from error


def _is_secret(path: tuple[str, ...]) -> bool:
    """Whether a setting is one secret; as YAML it would end at a ``#`` or become a number."""
    models: list[type[BaseModel]] = [ClusterConfig]
    for part in path[:-1]:
        models = _models_below(models, part)
    fields = [model.model_fields.get(path[-1]) for model in models]
    return any(field is not None and field.annotation is SecretStr for field in fields)


def _validate(settings: dict[str, Any], sources: Mapping[_Path, str]) -> ClusterConfig:
    try:
        return ClusterConfig.model_validate(settings)
    except ValidationError as error:
        problems = tuple(
            _describe(problem["type"], problem["loc"], problem["msg"], sources)
            for problem in error.errors(include_url=False, include_input=False)
            # Only says that another problem kept a default from being made.
            if problem["type"] != "default_factory_not_called"
        )
        # The cause holds the input, secrets included, so it must not travel along.
        raise ConfigError(problems) from None


def _describe(kind: str, loc: _Path, message: str, sources: Mapping[_Path, str]) -> str:
    # Pydantic puts the names of union members into the path; a user's path has none.
    path = _user_path(loc)
    where = next(
        (sources[path[:end]] for end in range(len(path), 0, -1) if path[:end] in sources), ""
    )
    prefix = f"{where}: " if where else ""
    name = _dotted(path) or "the settings"
    if kind == "extra_forbidden":
        known = _fields_at(path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"known are: {', '.join(sorted(known))}"
        return f"{prefix}{name}: unknown field; {hint}"
    return f"{prefix}{name}: {message.removeprefix('Value error, ')}"


def _user_path(loc: _Path) -> _Path:
    path: list[str | int] = []
    models: list[type[BaseModel]] = [ClusterConfig]
    for part in loc:
        fields = {name for model in models for name in model.model_fields}
        if isinstance(part, str) and models and part not in fields and part != loc[-1]:
            continue
        path.append(part)
        models = _models_below(models, part)
    return tuple(path)


def _fields_at(path: _Path) -> list[str]:
    models: list[type[BaseModel]] = [ClusterConfig]
    for part in path:
        models = _models_below(models, part)
    return sorted({name for model in models for name in model.model_fields})


def _models_below(models: list[type[BaseModel]], part: str | int) -> list[type[BaseModel]]:
    if isinstance(part, int):
        return models
    found: list[type[BaseModel]] = []
    for model in models:
        if part in model.model_fields:
            found.extend(_models_in(model.model_fields[part].annotation))
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - any type expression
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _dotted(path: _Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
