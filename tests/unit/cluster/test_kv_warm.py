"""Files to requests, and requests to a real HTTP server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.chat_client import ChatClient
from cluster.errors import ConfigError
from cluster.kv_warm import WarmText, read_texts, warm

USAGE = {"prompt_tokens": 200, "prompt_tokens_details": {"cached_tokens": 64}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "m1"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen[self.path, json.dumps(body, sort_keys=True)] = body
        if body.get("prompt") == "too long":
            self._answer(400, {"error": {"message": "it is too long"}})
            return
        self._answer(200, {"usage": USAGE})

    def _answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.seen = {}
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def write(folder, **contents):
    files = []
    for name, content in contents.items():
        files.append(folder / name.replace("_", "."))
        files[-1].write_text(content)
    return files


def test_files_become_prompts(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    files = write(
        tmp_path,
        system_txt=" Be kind.\n",
        list_json=json.dumps(messages),
        whole_json=json.dumps({"messages": messages, "tools": []}),
    )
    system, from_list, whole = read_texts(files, is_raw=False)
    assert system.body["messages"][0] == {"role": "system", "content": "Be kind."}
    assert system.body["messages"][1]["role"] == "user", "templates want somebody to speak"
    assert from_list.body == {"messages": messages}
    assert whole.body == {"messages": messages, "tools": []}
    assert {text.path for text in (system, from_list, whole)} == {"/v1/chat/completions"}
    [raw] = read_texts(files[:1], is_raw=True)
    assert (raw.path, raw.body) == ("/v1/completions", {"prompt": " Be kind.\n"})


def test_all_files_that_will_not_do_are_named(tmp_path):
    files = write(tmp_path, empty_txt=" \n", broken_json="{", other_json='{"prompt": "x"}')
    with pytest.raises(ConfigError) as caught:
        read_texts([*files, tmp_path / "missing.txt"], is_raw=False)
    for name in ("empty.txt", "broken.json", "other.json", "missing.txt"):
        assert name in str(caught.value)


def test_each_is_prefilled_once_and_a_refusal_ends_none_of_the_others(server):
    texts = [
        WarmText("a", "/v1/completions", {"prompt": "a"}),
        WarmText("b", "/v1/completions", {"prompt": "too long"}),
        WarmText("c", "/v1/chat/completions", {"messages": [{"role": "user", "content": "c"}]}),
    ]
    with ChatClient(f"http://127.0.0.1:{server.server_port}", None) as client:
        rows = list(warm(client, texts, 2))
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert [(row.prompt_tokens, row.cached_tokens) for row in rows] == [
        (200, 64),
        (0, 0),
        (200, 64),
    ]
    assert ["it is too long" in row.error for row in rows] == [False, True, False]
    assert len(server.seen) == 3
    assert {body["max_tokens"] for body in server.seen.values()} == {1}
    assert {body["model"] for body in server.seen.values()} == {"m1"}
