"""``paceline chat``: talk to a running cluster."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from cluster.chat_client import ChatClient
from cluster.commands.options import ClusterOption  # noqa: TC001 - typer reads it at run time
from cluster.console import err, out
from cluster.state import default_state_dir, find_cluster


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Asks this and ends; without it a conversation begins.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A server elsewhere, such as http://host:8000.")
    ] = None,
    cluster: ClusterOption = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="PACELINE_API_KEY", help="Where keys are asked for.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Stream answers of a running cluster."""
    address = url or find_cluster(default_state_dir(), cluster).http_url
    messages = [{"role": "system", "content": system}] if system else []
    options: dict[str, object] = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    with ChatClient(address.removesuffix("/v1"), api_key) as client:
        model = client.model()
        if prompt is not None:
            _ask(client, model, messages, prompt, options)
            return
        err.print(f"[dim]{model} at {address}; an empty line or Ctrl-D ends[/]")
        while question := _read():
            _ask(client, model, messages, question, options)


def _read() -> str:
    try:
        return err.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _ask(
    client: ChatClient,
    model: str,
    messages: list[dict[str, str]],
    question: str,
    options: dict[str, object],
) -> None:
    """Stream one answer to the terminal and add both to the conversation."""
    messages.append({"role": "user", "content": question})
    started = time.monotonic()
    answer = ""
    usage = None
    for part in client.stream(model, messages, **options):
        out.print(part.text, end="", markup=False, highlight=False)
        answer += part.text
        usage = part.usage or usage
    out.print()
    messages.append({"role": "assistant", "content": answer})
    if usage is not None:
        elapsed = time.monotonic() - started
        tokens = usage["completion_tokens"]
        err.print(f"[dim]{tokens} tokens in {elapsed:.1f} s, {tokens / elapsed:.1f} per second[/]")
