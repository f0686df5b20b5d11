"""Reads the prompts that a draft is trained on.

A text file holds one prompt a line. A ``.jsonl`` file holds one conversation a line, as
``messages`` or ``conversations`` with ``role`` and ``content`` (or ``from`` and ``value``), one
``prompt``, or ``turns`` as MT-bench has them, of which the first is taken. Of a conversation, what
stands behind its last user message is not read: the target writes its own answers. A folder holds
``.jsonl`` files at any depth, as a traffic log does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.engine.training.self_chat import ChatFrame
    from deployments.tokenizer import ChatTurn, Tokenizer

NO_LICENCE = "not stated"
_MARK = "@@@@"
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """Prompts of one file.

    Attributes:
        name: of the file.
        licence: as its user states it.
        digest: hex, of the file's bytes.
        prompts: in the target's tokens, up to where the answer begins.
    """

    name: str
    licence: str
    digest: str
    prompts: tuple[tuple[int, ...], ...]


def builtin_prompts(tokenizer: Tokenizer) -> PromptSource:
    """The prompts that come with the package."""
    source = files("deployments.engine.torch_engine") / "data" / "student_prompts.txt"
    return _source(
        Path(source.name),
        source.read_bytes(),
        "Apache-2.0; every second line MIT (GSM8K, test split)",
        tokenizer,
        "the built-in prompts",
    )


def chat_frame(tokenizer: Tokenizer) -> ChatFrame:
    """What stands around a user's words in this model's chats.

    Raises:
        ConfigError: the model has no chat template, or one that changes the words.
    """
    from deployments.engine.training.self_chat import ChatFrame
    from deployments.tokenizer import ChatTurn

    words = tuple(tokenizer.encode(_MARK))
    if tokenizer.has_chat_template:
        whole = tuple(tokenizer.encode_chat([ChatTurn("user", _MARK)]))
        for start in range(1, len(whole) - len(words)):
            if whole[start : start + len(words)] == words:
                return ChatFrame(whole[:start], whole[start + len(words) :])
    raise ConfigError(
        ("--self-chat: the model has no chat template that shows where a user speaks",)
    )


def read_prompts(path: Path, licence: str, tokenizer: Tokenizer, option: str) -> PromptSource:
    """The prompts of a file.

    Args:
        path: ``.jsonl``, any text, or a folder of ``.jsonl`` files.
        licence: of its contents.
        tokenizer: the target's.
        option: that named the file, for messages.

    Raises:
        ConfigError: the file cannot be read or holds something else; the message names the line.
    """
    data = _read(path, option)
    return _source(path, data, licence, tokenizer, f"{option}: {path}")


def read_conversations(path: Path, option: str) -> list[tuple[str, list[ChatTurn]]]:
    """The same file's conversations, each up to its last user message, with where it stands.

    Raises:
        ConfigError: as of ``read_prompts``.
    """
    return list(_conversations(path, _read(path, option), f"{option}: {path}"))


def _read(path: Path, option: str) -> bytes:
    try:
        if path.is_dir():
            return b"".join(file.read_bytes() for file in sorted(path.rglob("*.jsonl")))
        return path.read_bytes()
    except OSError as error:
        raise ConfigError((f"{option}: {path}: {error.strerror or error}",)) from error


def _source(
    path: Path, data: bytes, licence: str, tokenizer: Tokenizer, where: str
) -> PromptSource:
    from deployments.errors import RequestInvalidError

    prompts = []
    for at, turns in _conversations(path, data, where):
        try:
            prompts.append(_encode(turns, tokenizer))
        except RequestInvalidError as error:
            raise ConfigError((f"{at}: {error}",)) from error
    digest = blake2b(data, digest_size=16).hexdigest()
    return PromptSource(name=path.name, licence=licence, digest=digest, prompts=tuple(prompts))


def _conversations(path: Path, data: bytes, where: str) -> Iterator[tuple[str, list[ChatTurn]]]:
    from deployments.tokenizer import ChatTurn

    try:
        lines = data.decode("utf-8").split("\n")  # JSON may hold other ends of lines as they are
    except UnicodeDecodeError as error:
        raise ConfigError((f"{where}: not UTF-8: {error}",)) from error
    if not any(map(str.strip, lines)):
        raise ConfigError((f"{where}: no prompts",))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{where}:{number}"
        is_json = path.suffix == ".jsonl" or path.is_dir()
        yield at, _conversation(line, at) if is_json else [ChatTurn("user", line.strip())]


def _encode(turns: list[ChatTurn], tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.has_chat_template or len(turns) > 1:
        return tuple(tokenizer.encode_chat(turns))
    return tuple(tokenizer.encode(turns[0].content))


def _conversation(line: str, at: str) -> list[ChatTurn]:
    from deployments.tokenizer import ChatTurn

    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError((f"{at}: not JSON: {error}",)) from error
    if not isinstance(row, dict):
        raise ConfigError((f"{at}: not a JSON object",))
    if isinstance(row.get("prompt"), str):
        return [ChatTurn("user", row["prompt"])]
    if isinstance(questions := row.get("turns"), list) and questions:
        return [ChatTurn("user", str(questions[0]))]
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list):
        raise ConfigError((f"{at}: has none of 'messages', 'conversations', 'prompt' and 'turns'",))
    turns = list(_turns(messages, at))
    while turns and turns[-1].role != "user":
        turns.pop()
    if not turns:
        raise ConfigError((f"{at}: no message of a user",))
    return turns


def _turns(messages: list[Any], at: str) -> Iterator[ChatTurn]:
    from deployments.tokenizer import ChatTurn

    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ConfigError((f"{at}: message {index} is not an object",))
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ConfigError((f"{at}: message {index} needs a role and a content, both texts",))
        yield ChatTurn(_ROLES.get(role, role), content)
