"""Every order of events, up to a depth: what one target, one drafter and their stream can get into.

States are reached by replaying the events that lead there, and told apart by what their parts
remember. In every state holds what ``ProtocolWorld.check`` says, and from every state tables flow
again once the network is calm.
"""

from collections import deque

import pytest

from tests.fakes_protocol import ENDPOINTS, ProtocolWorld

DEPTH = 4


class Explored(ProtocolWorld):
    """One session."""

    def __init__(self) -> None:
        super().__init__(max_frame_tokens=4)
        self.key = self.open(ENDPOINTS[0], prompt_len=5)
        self.client.upkeep()

    # Events.

    def plain_step(self):
        return self.step([self.key])

    def wrong_step(self):
        return self.step([self.key], self.half_wrong)

    def upkeep(self):
        before = self.fingerprint()
        self.client.upkeep()
        return self.fingerprint() != before

    EVENTS = (
        plain_step,
        wrong_step,
        upkeep,
        lambda self: self.to_drafter(),
        lambda self: self.to_drafter(is_repeated=True),
        lambda self: self.to_target(),
        lambda self: self.lose(is_to_drafter=True),
        lambda self: self.lose(is_to_drafter=False),
        lambda self: self.overtake(is_to_drafter=True),
        lambda self: self.overtake(is_to_drafter=False),
        lambda self: self.crash(self.homes[self.key]),
        lambda self: self.evict(self.homes[self.key]),
        lambda self: self.move(self.key),
    )

    def fingerprint(self):
        """All that later events depend on."""
        session = self.client._sessions[self.key]
        drafters = [
            sorted(
                (key, held.epoch, len(held.token_ids), held._round, held.question is None)
                for key, held in service._sessions.items()
            )
            for service in self.services.values()
        ]
        links = [
            (endpoint, link.state, bool(link._closes), vars_of(link._pace))
            for endpoint, link in self.client._links.items()
        ]
        wires = [
            tuple(data for _, _, data in sorted(end._under_way))
            for stream in self.streams
            for end in (stream, stream._peer)
        ]
        return repr(
            (
                self.lengths,
                self.homes,
                vars_of(session),
                list(self.client._commands),
                drafters,
                links,
                wires,
            )
        )

    @classmethod
    def served(cls):
        """A session that its drafter serves, with a table at hand and another asked for."""
        world = cls()
        world.calm_down()
        return world


def vars_of(thing):
    slots = getattr(type(thing), "__slots__", None)
    found = {name: getattr(thing, name) for name in slots} if slots else dict(vars(thing))
    found.pop("spec", None)
    return {
        name: vars_of(value) if type(value).__module__.startswith("deployments") else value
        for name, value in found.items()
    }


def reached_by(begin, path):
    world = begin()
    has_changed = True
    for event in path:
        has_changed = event(world)
        world.check()
    return world, has_changed


@pytest.mark.parametrize("begin", [Explored, Explored.served], ids=["unopened", "served"])
def test_every_order_of_few_events(begin):
    seen = {begin().fingerprint()}
    ahead = deque([()])
    while ahead:
        path = ahead.popleft()
        for event in Explored.EVENTS:
            world, has_changed = reached_by(begin, (*path, event))
            if not has_changed or (mark := world.fingerprint()) in seen:
                continue
            seen.add(mark)
            if len(path) + 1 < DEPTH:
                ahead.append((*path, event))
            world.calm_down()
    assert len(seen) > 300
