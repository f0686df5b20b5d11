import random

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.drafters.ngram_index import MAX_MATCH_TOKENS, NgramIndex
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


def test_equal_matches_are_won_by_the_most_frequent_then_the_newest():
    frequent = [8, 1, 2, 5, 8, 1, 2, 5, 8, 1, 2, 6, 8, 1, 2]
    newest = [7, 1, 2, 5, 0, 1, 2, 6, 9, 1, 2]
    drafter = SuffixDrafter()
    for session_id, (text, bonus) in enumerate([(frequent, 5), (newest, 6)]):
        drafter.open(spec_of(session_id, text))
        found = first(drafter, session_id, text, k=0, fanout=1)
        assert found == OutcomeRow(-1, bonus, ())


def test_a_loop_goes_on():
    text = [4, 5, 6] * 4
    drafter = SuffixDrafter()
    drafter.open(spec_of(1, text))
    assert first(drafter, 1, text, k=6, fanout=1) == OutcomeRow(-1, 4, (5, 6, 4, 5, 6, 4))


def test_too_short_a_match_proposes_nothing():
    text = [1, 2, 3, 9, 9, 2, 3]
    for min_match_tokens, is_found in ((2, True), (3, False)):
        drafter = SuffixDrafter(min_match_tokens=min_match_tokens)
        drafter.open(spec_of(1, text))
        assert (first(drafter, 1, text, k=0, fanout=1) is not None) == is_found


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
    drafter = SuffixDrafter(
        max_session_tokens=200, max_tenant_tokens=100, max_tenants=3, max_sessions=5
    )
    for number in range(40):
        tenant = f"t{number % 8}"
        drafter.open(spec_of(number, [rng.randrange(9) for _ in range(150)], tenant=tenant))
        drafter.append(number, [rng.randrange(9) for _ in range(500)])
    assert len(drafter._sessions) == 5
    assert len(drafter._tenants) == 3
    indexes = [state.index for state in drafter._sessions.values()]
    assert all(len(index) <= 200 for index in indexes)
    assert all(len(index) <= 100 for index in drafter._tenants.values())
    assert all(len(filed) <= 200 for index in indexes for filed in index._newest)


@given(st.lists(st.integers(0, 2), max_size=80))
def test_matches_are_real(text):
    index = NgramIndex(min_match_tokens=2, max_tokens=10_000)
    index.extend(text)
    for match in index.matches(text):
        assert 0 < match.position < len(text)
        back = match.num_matched
        assert text[match.position - back : match.position] == text[len(text) - back :]
        assert 2 <= back <= MAX_MATCH_TOKENS


@given(st.lists(st.integers(0, 2), min_size=3, max_size=60))
def test_a_repeated_pair_is_always_found(text):
    index = NgramIndex(min_match_tokens=2, max_tokens=10_000)
    index.extend(text)
    pair = text[-2:]
    occurs = any(text[at : at + 2] == pair for at in range(len(text) - 2))
    assert bool(index.matches(text)) == occurs
