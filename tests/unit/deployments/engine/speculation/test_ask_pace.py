from deployments.engine.speculation.ask_pace import AskPace
from deployments.engine.speculation.types import NO_ASK, Ask

FULL = Ask(3, 2)


def test_all_is_asked_while_tables_come_in_time():
    pace = AskPace()
    for _ in range(50):
        assert pace.limit(FULL) == FULL
        pace.on_table(is_late=False)


def test_late_tables_shrink_the_fanout_first_then_the_drafts_then_all():
    pace = AskPace()
    asked = []
    for _ in range(5):
        asked.append(pace.limit(FULL))
        pace.on_table(is_late=True)
    assert asked == [Ask(3, 2), Ask(3, 1), Ask(2, 1), Ask(1, 1), NO_ASK]


def test_tables_in_time_let_it_grow_again():
    pace = AskPace()
    for _ in range(3):
        pace.limit(FULL)
        pace.on_table(is_late=True)
    sizes = []
    for _ in range(500):
        sizes.append(sum(pace.limit(FULL)))
        pace.on_table(is_late=False)
    assert sizes == sorted(sizes)
    assert sizes[-1] == sum(FULL)


def test_a_drafter_that_is_always_late_is_asked_ever_more_rarely():
    pace = AskPace()
    asked_at = []
    for turn in range(2000):
        if pace.limit(FULL) != NO_ASK:
            asked_at.append(turn)
            pace.on_table(is_late=True)
    assert asked_at[-1] > 1500  # it never gives up
    assert len(asked_at) < 70


def test_growing_that_fails_is_tried_more_rarely():
    """Only the smallest table is in time."""
    pace = AskPace()
    late = []
    for turn in range(4000):
        ask = pace.limit(FULL)
        if ask == NO_ASK:
            continue
        is_late = ask != Ask(1, 1)
        pace.on_table(is_late=is_late)
        if is_late:
            late.append(turn)
    assert len(late) < 80
    assert late[-1] > 3000


def test_a_round_that_wants_no_table_is_left_alone():
    pace = AskPace()
    for _ in range(20):
        assert pace.limit(NO_ASK) == NO_ASK
    assert pace.limit(FULL) == FULL
