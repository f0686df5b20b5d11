import pytest


@pytest.fixture
def peers():
    """The other ends of connections that a test makes up; closed with it."""
    peers = []
    yield peers
    for peer in peers:
        peer.close()
