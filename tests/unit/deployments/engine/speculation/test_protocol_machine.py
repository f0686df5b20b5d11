"""Long lives of targets, drafters and their streams: sessions come and go while frames are lost,
doubled, reordered and cut, and drafters die, restart, fail, forget and are exchanged.

Hypothesis chooses what happens and, where something breaks, finds a short way there. Every run
chooses the same (``derandomize``). ``ProtocolWorld.check`` holds after every event; in the end the
network is calm, every session gets tables, and once all are closed nothing is left at the drafters.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.fakes_protocol import ENDPOINTS, LIMITS, ProtocolWorld

MAX_SESSIONS = 3
DIRECTION = st.booleans()
ENDPOINT = st.sampled_from(ENDPOINTS)


def has_sessions(machine):
    return bool(machine.world.lengths)


class Protocol(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = ProtocolWorld(max_frame_tokens=5 * MAX_SESSIONS)

    def a_session(self, number: int) -> int:
        keys = sorted(self.world.lengths)
        return keys[number % len(keys)]

    @initialize()
    def serve_two_sessions(self):
        for endpoint in ENDPOINTS:
            self.world.open(endpoint, 5)
        self.world.calm_down()

    @precondition(lambda self: len(self.world.lengths) < MAX_SESSIONS)
    @rule(endpoint=ENDPOINT, prompt_len=st.sampled_from([5, 40]))
    def open(self, endpoint, prompt_len):
        self.world.open(endpoint, prompt_len)

    @precondition(has_sessions)
    @rule(number=st.integers(0, 5))
    def close(self, number):
        self.world.close(self.a_session(number))

    @precondition(has_sessions)
    @rule(number=st.integers(0, 5))
    def move(self, number):
        self.world.move(self.a_session(number))

    @precondition(has_sessions)
    @rule(number=st.integers(0, 5))
    def detach(self, number):
        self.world.client.detach(f"r{self.a_session(number)}")

    @precondition(has_sessions)
    @rule(skipped=st.sets(st.integers(0, MAX_SESSIONS), max_size=2), is_wrong=st.booleans())
    def step(self, skipped, is_wrong):
        keys = [key for place, key in enumerate(self.world.lengths) if place not in skipped]
        if is_wrong:
            self.world.step(keys, self.world.half_wrong)
        else:
            self.world.step(keys)

    @rule()
    def upkeep(self):
        self.world.client.upkeep()

    @rule(is_to_drafter=DIRECTION, is_repeated=st.booleans())
    def deliver(self, is_to_drafter, is_repeated):
        if is_to_drafter:
            self.world.to_drafter(is_repeated=is_repeated)
        else:
            self.world.to_target(is_repeated=is_repeated)

    @rule()
    def round_of_all(self):
        """Nothing goes wrong for a moment: links come up, and what is under way arrives."""
        self.world.client.upkeep()
        self.world.step(self.world.lengths)
        self.world.deliver_all()

    @rule()
    def gap(self):
        """The round behind a lost one makes the drafter ask for what it missed."""
        self.world.step(self.world.lengths)
        self.world.lose(is_to_drafter=True)
        self.world.step(self.world.lengths)
        self.world.deliver_all()

    @rule(is_to_drafter=DIRECTION)
    def lose(self, is_to_drafter):
        self.world.lose(is_to_drafter=is_to_drafter)

    @rule(is_to_drafter=DIRECTION)
    def overtake(self, is_to_drafter):
        self.world.overtake(is_to_drafter=is_to_drafter)

    @rule(is_to_drafter=DIRECTION, share=st.floats(0, 1))
    def cut(self, is_to_drafter, share):
        self.world.cut(is_to_drafter=is_to_drafter, share=share)

    @rule(endpoint=ENDPOINT)
    def kill_or_restart(self, endpoint):
        if endpoint in self.world.services:
            self.world.kill(endpoint)
        else:
            self.world.start(endpoint)

    @rule(endpoint=ENDPOINT)
    def crash(self, endpoint):
        if endpoint in self.world.services:
            self.world.crash(endpoint)

    @rule(endpoint=ENDPOINT)
    def evict(self, endpoint):
        if endpoint in self.world.services:
            self.world.evict(endpoint)

    @rule(endpoint=ENDPOINT)
    def exchange_the_drafter(self, endpoint):
        if endpoint in self.world.services:
            self.world.swap(endpoint)

    @rule(endpoint=ENDPOINT)
    def fail_the_drafter(self, endpoint):
        if endpoint in self.world.oracles:
            self.world.oracles[endpoint].is_about_to_fail = True

    @rule()
    def sessions_expire(self):
        self.world.network.advance(LIMITS.idle_timeout_s)
        self.world.let_draft()

    @invariant()
    def check(self):
        self.world.check()

    def teardown(self):
        world = self.world
        for endpoint in ENDPOINTS:
            if endpoint not in world.services:
                world.start(endpoint)
        for key, endpoint in world.homes.items():
            world.client.attach(f"r{key}", endpoint)
        world.calm_down()
        world.check()
        for key in list(world.lengths):
            world.close(key)
        # A close that was lost is not said again; its session expires.
        world.network.advance(LIMITS.idle_timeout_s)
        world.client.upkeep()
        world.deliver_all()
        world.check()
        assert sum(len(service._sessions) for service in world.services.values()) == 0


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(
    derandomize=True, deadline=None, max_examples=150, stateful_step_count=40
)
