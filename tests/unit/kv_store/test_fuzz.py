import numpy as np
import pytest

from kv_store import PageUnsupportedError
from tests.fuzz import kv_pages, page_server


def test_damaged_pages_are_refused_and_every_kind_of_input_occurs():
    outcomes = kv_pages.run(4000, seed=1)
    assert sum(outcomes.values()) == 4000
    assert min(outcomes.values()) > 50


def test_the_same_seed_gives_the_same_inputs():
    assert kv_pages.run(500, seed=2) == kv_pages.run(500, seed=2)


def test_a_reader_that_serves_anything_is_found_out(monkeypatch):
    def careless(blob, key, layout, codecs, out):
        out[:] = np.resize(np.frombuffer(bytes(blob) or b"\0", np.uint8), out.shape)

    cases = kv_pages.make_cases()
    monkeypatch.setattr(kv_pages, "make_cases", lambda: cases)
    monkeypatch.setattr(kv_pages, "decode_page", careless)
    with pytest.raises(kv_pages.WrongPageError, match="was served"):
        kv_pages.run(100)


def test_a_reader_that_refuses_everything_is_found_out(monkeypatch):
    def anxious(*_):
        raise PageUnsupportedError("no")

    [*cases] = kv_pages.make_cases()
    monkeypatch.setattr(kv_pages, "make_cases", lambda: cases)
    monkeypatch.setattr(kv_pages, "decode_page", anxious)
    monkeypatch.setattr(kv_pages, "_damage", lambda case, _: (case.blob, False))
    with pytest.raises(kv_pages.WrongPageError, match="was refused"):
        kv_pages.run(1)


def test_what_page_servers_and_readers_receive_never_gives_a_wrong_page():
    outcomes = page_server.run(8000, seed=1)
    assert sum(outcomes.values()) == 8000
    assert len(outcomes) == 6
    assert min(outcomes.values()) > 50


def test_a_server_that_asks_for_no_token_is_found_out(monkeypatch):
    class Careless(page_server.PageSession):
        def __init__(self, source, token):
            super().__init__(source, token)
            self.is_authenticated = True

    monkeypatch.setattr(page_server, "PageSession", Careless)
    with pytest.raises(page_server.WrongAnswerError):
        page_server.run(4000)


def test_a_server_that_confuses_pages_is_found_out(monkeypatch):
    first = next(iter(page_server._PAGES.values()))
    monkeypatch.setattr(page_server._Source, "read", lambda self, key: first)
    with pytest.raises(page_server.WrongAnswerError):
        page_server.run(4000)
