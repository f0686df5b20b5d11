"""Ctrl-C of ``paceline bench serve``: what has ended is reported, what is in flight is not."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[4]
NUM_ANSWERED = 20


class Server(ThreadingHTTPServer):
    """Answers some requests; the others hang until the end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = itertools.count()
        self.hanging = threading.Event()
        self.over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if next(self.server.asked) >= NUM_ANSWERED:
            self.server.hanging.set()
            self.server.over.wait(600)
            return
        text = {"choices": [{"delta": {"content": "x"}}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
        events = [f"data: {json.dumps(event)}\n\n" for event in (text, usage)]
        self._answer("".join([*events, "data: [DONE]\n\n"]).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join(60)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_has_ended(
    server: Server, tmp_path: Path, signum: signal.Signals
) -> None:
    report, requests = tmp_path / "report.json", tmp_path / "requests.jsonl"
    command = [
        *(sys.executable, "-m", "cluster", "bench", "serve", "--rate", "10:360.05"),
        *("--burstiness", "0", "--timeout", "3600", "--json"),
        *("--url", f"http://127.0.0.1:{server.server_port}"),
        *("--out", str(report), "--requests", str(requests)),
    ]
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    try:
        assert server.hanging.wait(300)
        run.send_signal(signum)
        said, _ = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 130
    written = json.loads(report.read_text())
    assert json.loads(said) == written
    endings = Counter(json.loads(line)["ending"] for line in requests.read_text().splitlines())
    assert set(endings) == {"complete", "unfinished"}
    summary = written["all"]
    assert summary["num_requests"] == summary["num_complete"] == endings["complete"]
    assert sum(step["due"] for step in written["timeline"]) == endings["complete"] <= NUM_ANSWERED
    stopped = written["stopped"]
    assert stopped["num_broken_off"] == endings["unfinished"]
    assert endings.total() + stopped["num_never_due"] == 3600
