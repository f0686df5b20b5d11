import random

from deployments.engine.speculation.drafters import suffix
from deployments.engine.speculation.drafters.suffix import SuffixDrafter
from deployments.engine.speculation.types import DraftOrigin, DraftTree, OutcomeRow
from tests.fakes_speculation import query_of, spec_of


def first(drafter: SuffixDrafter, session_id: int, text: list[int], **asked) -> OutcomeRow | None:
    rows = drafter.propose([query_of(session_id, text, **asked)])[0]
    return rows[0] if rows else None


def test_copies_what_followed_the_longest_suffix():
    text = [1, 2, 3, 4, 5, 9, 9, 2, 3, 6, 7, 9, 1, 2, 3]
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    assert first(drafter, 1, text, k=2, fanout=1) == OutcomeRow(-1, 4, (5, 9))


def test_equal_contexts_are_won_by_the_most_frequent():
    text = [8, 1, 2, 5, 8, 1, 2, 5, 8, 1, 2, 6, 8, 1, 2]
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    found = drafter.propose([query_of(1, text, k=0, fanout=2)])[0]
    assert [row.bonus_token_id for row in found] == [5, 6]
    assert found[0].chances > found[1].chances


def test_a_loop_goes_on():
    text = [4, 5, 6] * 4
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    assert first(drafter, 1, text, k=6, fanout=1) == OutcomeRow(-1, 4, (5, 6, 4, 5, 6, 4))


def test_a_token_never_seen_before_proposes_nothing():
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, [1, 2, 3, 9]))
    assert first(drafter, 1, [1, 2, 3, 9], k=2, fanout=1) is None


def test_chances_tell_what_is_sure():
    text = [1, 2, 3, 4] * 9 + [5, 6, 5, 7, 5, 8, 5]
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    unsure = first(drafter, 1, text, k=0, fanout=1)
    sure = first(drafter, 1, [*text, 1, 2], k=3, fanout=1)
    assert sure.token_ids == (3, 4, 1, 2)
    assert len(sure.chances) == 4
    assert min(sure.chances) > 0.8 > 0.4 > unsure.chances[0]


def test_what_stands_behind_an_unlikely_token_is_not_looked_for():
    rng = random.Random(3)  # noqa: S311
    text = [token for _ in range(1500) for token in (1, rng.randrange(2, 6))] + [1]
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    for _ in range(8):
        found = first(drafter, 1, text, k=12, fanout=1)
    assert 1 <= len(found.token_ids) < 12


def test_a_long_prompt_is_learned_part_by_part():
    text = [*range(100, 700), *range(600), 100, 101]
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    assert len(drafter._sessions[1].counts) == 0
    sizes = []
    for _ in range(4):
        drafter.propose([query_of(1, text)])
        sizes.append(len(drafter._sessions[1].counts))
    assert sizes == [512, 1024, len(text), len(text)]
    assert first(drafter, 1, text, k=1, fanout=1) == OutcomeRow(-1, 102, (103,))


def test_rows_behind_a_draft_in_flight_avoid_its_own_tokens():
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2]
    in_flight = DraftTree.chain((3, 4), DraftOrigin.POOL)
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    rows = drafter.propose([query_of(1, text, in_flight=in_flight, k=1, fanout=2)])[0]
    assert OutcomeRow(1, 9, (1,)) in rows
    assert OutcomeRow(0, 5, (9,)) in rows
    assert all(row.bonus_token_id != 4 for row in rows if row.node == 0)


def test_learns_output_for_the_same_tenant_only():
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, [1, 2], tenant="a"))
    drafter.append(1, [10, 11, 12, 13, 14])
    drafter.close(1)
    drafter.open(spec_of(2, [10, 11, 12], tenant="a"))
    drafter.open(spec_of(3, [10, 11, 12], tenant="b"))
    assert first(drafter, 2, [10, 11, 12], k=1, fanout=1) == OutcomeRow(-1, 13, (14,))
    assert first(drafter, 3, [10, 11, 12], k=1, fanout=1) is None


def test_a_long_output_is_learned_part_by_part():
    drafter = SuffixDrafter()
    for number, length in ((1, 700), (2, 300)):
        drafter.open(spec_of(number, [1]))
        drafter.append(number, range(1000 * number, 1000 * number + length))
        drafter.close(number)
    drafter.open(spec_of(3, [1]))
    assert drafter._num_output_tokens == 0
    sizes = []
    for _ in range(3):
        drafter.propose([query_of(3, [1])])
        sizes.append(drafter._num_output_tokens)
    assert sizes == [512, 1000, 1000]
    drafter.open(spec_of(4, [1699]))  # the end of the first; the second did not follow it
    assert first(drafter, 4, [1699], k=0, fanout=1) is None


def test_outputs_that_nobody_waits_for_are_bounded(monkeypatch):
    monkeypatch.setattr(suffix, "_MOST_WAITING", 1000)
    drafter = SuffixDrafter()
    for number in range(5):
        drafter.open(spec_of(number, [1]))
        drafter.append(number, [number] * 400)
        drafter.close(number)
    assert [output.token_ids[0] for output in drafter._ended] == [3, 4]


def test_prompts_are_not_learned():
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, [10, 11, 12, 13, 14]))
    drafter.append(1, [1])
    drafter.close(1)
    drafter.open(spec_of(2, [10, 11, 12]))
    assert first(drafter, 2, [10, 11, 12], k=1, fanout=1) is None


def test_output_is_learned_once_however_it_is_heard_of():
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, [1, 2, 3]))
    drafter.append(1, [4, 5])
    drafter.propose([query_of(1, [1, 2, 3, 4, 5, 6])])
    drafter.append(1, [7])
    drafter.propose([query_of(1, [1, 2, 3, 4, 5, 6, 7])])
    assert drafter._sessions[1].output == [4, 5, 6, 7]


def test_memory_is_bounded():
    rng = random.Random(4)  # noqa: S311
    drafter = SuffixDrafter(max_session_tokens=200, max_tenant_tokens=100, max_output_tokens=350)
    for number in range(40):
        tenant = f"t{number % 8}"
        drafter.open(spec_of(number, [rng.randrange(9) for _ in range(150)], tenant=tenant))
        drafter.append(number, [rng.randrange(9) for _ in range(500)])
        if number >= 5:
            drafter.close(number - 5)
            drafter.propose([])
    assert len(drafter._sessions) == 5
    assert 3 <= len(drafter._tenants) <= 7
    for session_id, state in list(drafter._sessions.items()):
        assert len(state.pending) <= 200
        drafter.propose([query_of(session_id, [])])
        assert len(state.counts) <= 200
    assert all(len(counts) <= 100 for counts in drafter._tenants.values())
    assert sum(map(len, drafter._tenants.values())) == drafter._num_output_tokens <= 350
