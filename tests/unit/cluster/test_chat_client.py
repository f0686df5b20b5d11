"""The command line's own client, against a real HTTP server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.chat_client import ChatClient
from cluster.errors import RequestError


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "m1"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.headers.get("Authorization"), body))
        if self.server.refusal:
            self._answer(429, {"error": {"message": self.server.refusal}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in self.server.events:
            data = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {data}\n\n".encode())

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
        http.seen, http.events, http.refusal = [], [], ""
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


@pytest.fixture
def client(server):
    with ChatClient(f"http://127.0.0.1:{server.server_port}", "key") as made:
        yield made


def delta(text: str) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def test_a_stream_is_put_together_and_ends_with_its_usage(server, client):
    usage = {"completion_tokens": 2}
    opening = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    server.events = [opening, delta("Hel"), delta("lo"), {"choices": [], "usage": usage}, "[DONE]"]
    parts = list(client.stream(client.model(), [{"role": "user", "content": "hi"}], seed=3))
    assert "".join(part.text for part in parts) == "Hello"
    assert parts[-1].usage == usage
    [(authorization, body)] = server.seen
    assert authorization == "Bearer key"
    assert (body["model"], body["seed"], body["stream"]) == ("m1", 3, True)


def test_a_refusal_is_told_in_the_servers_words(server, client):
    server.refusal = "Rate limit reached"
    with pytest.raises(RequestError, match="429: Rate limit reached"):
        list(client.stream("m1", []))


def test_an_error_in_the_middle_of_a_stream_is_raised(server, client):
    server.events = [delta("Hel"), {"error": {"message": "The replica died."}}]
    with pytest.raises(RequestError, match="The replica died"):
        list(client.stream("m1", []))
