from deployments.engine.speculation.ask_pace import AskPace
from deployments.engine.speculation.types import NO_ASK, Ask

FULL = Ask(3, 2, within_s=0.02)


def sizes_while(pace, num_tables, is_late):
    """What is asked meanwhile; ``is_late`` tells of what was asked."""
    asked = []
    for _ in range(num_tables):
        asked.append(pace.limit(FULL))
        if asked[-1] != NO_ASK:
            pace.on_table(is_late=is_late(asked[-1]))
    return asked


def test_all_is_asked_while_tables_come_in_time():
    asked = sizes_while(AskPace(), 50, lambda _: False)
    assert set(asked) == {FULL}


def test_a_late_table_now_and_then_changes_nothing():
    pace = AskPace()
    for turn in range(400):
        assert pace.limit(FULL) == FULL
        pace.on_table(is_late=turn % 5 == 0)


def test_late_tables_shrink_the_fanout_first_then_the_drafts_then_all():
    asked = sizes_while(AskPace(), 100, lambda _: True)
    sizes = [(ask.num_draft_tokens, ask.fanout) for ask in dict.fromkeys(asked)]
    assert sizes == [(3, 2), (3, 1), (2, 1), (1, 1), (0, 0)]
    assert {ask.within_s for ask in asked if ask != NO_ASK} == {FULL.within_s}


def test_tables_in_time_let_it_grow_again():
    pace = AskPace()
    sizes_while(pace, 20, lambda _: True)
    asked = sizes_while(pace, 1500, lambda _: False)
    sizes = [ask.num_draft_tokens + ask.fanout for ask in asked if ask != NO_ASK]
    assert sizes == sorted(sizes)
    assert asked[-1] == FULL


def test_a_drafter_that_is_always_late_is_asked_ever_more_rarely():
    asked = sizes_while(AskPace(), 2000, lambda _: True)
    asked_at = [turn for turn, ask in enumerate(asked) if ask != NO_ASK]
    assert asked_at[-1] > 1900  # it never gives up
    assert len(asked_at) < 100


def test_growing_that_fails_is_tried_more_rarely():
    """Only the smallest table is in time."""
    late = [
        turn
        for turn, ask in enumerate(sizes_while(AskPace(), 4000, lambda ask: ask[:2] != (1, 1)))
        if ask[:2] not in {(1, 1), NO_ASK[:2]}
    ]
    assert len(late) < 300
    assert late[-1] > 3000


def test_a_round_that_wants_no_table_is_left_alone():
    pace = AskPace()
    for _ in range(20):
        assert pace.limit(NO_ASK) == NO_ASK
    assert pace.limit(FULL) == FULL
