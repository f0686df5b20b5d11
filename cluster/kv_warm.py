"""Texts whose pages shall be in the tier before anybody asks: read from files, prefilled once."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cluster.chat_client import ChatClient

_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
# A template may want somebody to speak behind the system message.
_LEAST_QUESTION = {"role": "user", "content": "."}


@dataclass(frozen=True, slots=True)
class WarmText:
    """One request.

    Attributes:
        name: of its file.
        path: of the surface that takes it.
        body: what makes its prompt, in OpenAI's form.
    """

    name: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What became of a text.

    Attributes:
        prompt_tokens: of its prompt; full pages of it are written to the tiers.
        cached_tokens: of these, that were there before.
        error: empty if it was answered.
    """

    name: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    error: str = ""


def read_texts(files: Sequence[Path], *, is_raw: bool) -> list[WarmText]:
    """Each file's request.

    A ``.json`` file holds a chat's ``messages``, or an object with ``messages`` and what else makes
    the prompt. Any other file is the system message of chats.

    Args:
        files: what to read.
        is_raw: whether files that are not JSON are prompts as they are, without a template.

    Raises:
        ConfigError: files that cannot be read, or are empty.
    """
    texts: list[WarmText] = []
    problems: list[str] = []
    for file in files:
        try:
            texts.append(_read_text(file, is_raw=is_raw))
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise ConfigError(tuple(problems))
    return texts


def warm(client: ChatClient, texts: Sequence[WarmText], num_parallel: int) -> Iterator[Warmed]:
    """Have each text prefilled once, and its first token thrown away; in order.

    Args:
        client: of the cluster; its key decides whose pages they are.
        texts: what to prefill.
        num_parallel: at once.
    """
    model = client.model()
    with ThreadPoolExecutor(num_parallel) as threads:
        yield from threads.map(lambda text: _warm_one(client, model, text), texts)


def _warm_one(client: ChatClient, model: str, text: WarmText) -> Warmed:
    began = time.monotonic()
    body = {"model": model, "max_tokens": 1, "temperature": 0, **text.body}
    try:
        usage = client.usage(text.path, body)
    except RequestError as error:
        return Warmed(name=text.name, seconds=time.monotonic() - began, error=str(error))
    details = usage.get("prompt_tokens_details") or {}
    return Warmed(
        name=text.name,
        prompt_tokens=int(usage["prompt_tokens"]),
        cached_tokens=int(details.get("cached_tokens") or 0),
        seconds=time.monotonic() - began,
    )


def _read_text(file: Path, *, is_raw: bool) -> WarmText:
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        document = json.loads(content)
        body = {"messages": document} if isinstance(document, list) else document
        if not isinstance(body, dict) or not body.get("messages"):
            raise ValueError("it has no messages")
        return WarmText(str(file), _CHAT, body)
    if not content.strip():
        raise ValueError("it is empty")
    if is_raw:
        return WarmText(str(file), _COMPLETIONS, {"prompt": content})
    system = {"role": "system", "content": content.strip()}
    return WarmText(str(file), _CHAT, {"messages": [system, _LEAST_QUESTION]})
