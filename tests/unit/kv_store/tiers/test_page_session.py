"""What a page server takes for a command, and to whom it gives pages."""

import pytest

from kv_store.tiers.page_session import (
    MAX_COMMAND_BYTES,
    PageSession,
    parse_served_name,
    served_name,
    take_command,
)
from kv_store.tiers.resp import ProtocolError, command
from tests.kv_pages import make_chain, make_layout

KEYS = make_chain(make_layout(), 3)
TOKEN = b"0123456789abcdef0123456789abcdef"
AUTH = command(b"AUTH", TOKEN)


class Pages(dict):
    """A source."""

    def contains(self, key):
        return key in self

    def read(self, key):
        return self.get(key)


def make_session():
    return PageSession(Pages({KEYS[0]: b"zero", KEYS[1]: b"one\r\n$-1\r\n"}), TOKEN)


def answers(session, data):
    return b"".join(bytes(reply) for reply in session.receive(data))


def test_names_stand_for_keys_and_nothing_else_does():
    assert [parse_served_name(served_name(key)) for key in KEYS] == KEYS
    name = served_name(KEYS[0])
    for other in (b"", name[:-1], name + b"0" * 9, name.upper(), b" " + name, name + b"\n"):
        assert parse_served_name(other) is None


def test_gives_pages_to_who_knows_the_token():
    session = make_session()
    assert answers(session, AUTH) == b"+OK\r\n"
    get = [command(b"GET", served_name(key)) for key in KEYS]
    exists = [command(b"EXISTS", served_name(key)) for key in KEYS]
    assert answers(session, b"".join(exists)) == b":1\r\n:1\r\n:0\r\n"
    pages = b"$4\r\nzero\r\n$10\r\none\r\n$-1\r\n\r\n$-1\r\n"
    assert answers(session, b"".join(get)) == pages
    assert session.num_served == 2
    assert answers(session, command(b"PING")) == b"+PONG\r\n"


def test_the_same_answers_however_the_bytes_arrive():
    session = make_session()
    data = AUTH + command(b"GET", served_name(KEYS[0])) + command(b"EXISTS", served_name(KEYS[2]))
    given = b"".join(answers(session, data[at : at + 1]) for at in range(len(data)))
    assert given == b"+OK\r\n$4\r\nzero\r\n:0\r\n"


@pytest.mark.parametrize("first", [b"GET", b"EXISTS", b"PING", b"FLUSHALL"])
def test_nothing_before_the_token(first):
    with pytest.raises(ProtocolError):
        answers(make_session(), command(first, served_name(KEYS[0])))


@pytest.mark.parametrize("token", [b"", TOKEN[:-1], TOKEN + b"0", TOKEN.upper()])
def test_a_wrong_token_ends_it(token):
    session = make_session()
    with pytest.raises(ProtocolError, match="wrong token"):
        answers(session, command(b"AUTH", token))
    assert not session.is_authenticated


def test_replies_before_the_break_are_given():
    session = make_session()
    given = []
    with pytest.raises(ProtocolError):
        given.extend(session.receive(AUTH + b"nonsense"))
    assert given == [b"+OK\r\n"]


@pytest.mark.parametrize("words", [(b"SET", b"a", b"b"), (b"GET", b"kv:x"), (b"KEYS",), (b"GET",)])
def test_other_commands_are_refused_and_change_nothing(words):
    session = make_session()
    answers(session, AUTH)
    assert answers(session, command(*words)).startswith(b"-ERR")
    assert answers(session, command(b"EXISTS", served_name(KEYS[0]))) == b":1\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"*0\r\n",
        b"*4\r\n",
        b"*-1\r\n",
        b"*1\r\n+PING\r\n",
        b"*1\r\n$4\r\nPING..",
        b"*1\r\n$999\r\n",
        b"*1\r\n$99999999999",
        b"\x00" * 6,
    ],
)
def test_what_is_no_command(data):
    with pytest.raises(ProtocolError):
        take_command(bytearray(data))


def test_no_more_is_awaited_than_a_command_may_have():
    longest = b"*2\r\n$3\r\nGET\r\n$400\r\n" + b"x" * 399
    assert len(longest) < MAX_COMMAND_BYTES
    assert take_command(bytearray(longest)) is None
    with pytest.raises(ProtocolError, match="too long"):
        take_command(bytearray(b"*2\r\n$400\r\n" + b"x" * 400 + b"\r\n$400\r\n"))
