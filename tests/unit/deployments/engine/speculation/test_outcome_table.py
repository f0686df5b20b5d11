from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.outcome_table import OutcomeTable, TableShelf
from deployments.engine.speculation.types import DraftOrigin, DraftTree, OutcomeRow

TEXT = [5, 6, 7]
IN_FLIGHT = DraftTree.chain((1, 2), DraftOrigin.POOL)
TABLE = OutcomeTable.build(
    3,
    IN_FLIGHT,
    [
        OutcomeRow(1, 3, (30, 31)),
        OutcomeRow(1, 4, (40, 41)),
        OutcomeRow(0, 8, (80,)),
        OutcomeRow(-1, 9, (90, 91)),
        OutcomeRow(-1, 10, ()),
    ],
)


def ahead(table, text):
    return table.draft_after(text).token_ids


def table_of(base_len, token_ids):
    row = OutcomeRow(-1, token_ids[0], tuple(token_ids[1:]))
    return OutcomeTable.build(base_len, DraftTree.chain((), DraftOrigin.POOL), [row])


tokens = st.integers(0, 3)
texts = st.lists(tokens, max_size=6)


def test_each_outcome_finds_its_row():
    assert ahead(TABLE, [*TEXT, 1, 2, 3]) == (30, 31)
    assert ahead(TABLE, [*TEXT, 1, 2, 4]) == (40, 41)
    assert ahead(TABLE, [*TEXT, 1, 8]) == (80,)
    assert ahead(TABLE, [*TEXT, 9]) == (90, 91)


def test_outcomes_nobody_foresaw_find_nothing():
    assert ahead(TABLE, [*TEXT, 1, 2, 5]) == ()
    assert ahead(TABLE, [*TEXT, 11]) == ()
    assert ahead(TABLE, [*TEXT, 10]) == ()


def test_a_round_late_the_rest_of_a_row_still_serves():
    assert ahead(TABLE, [*TEXT, 1, 2, 3, 30]) == (31,)
    assert ahead(TABLE, [*TEXT, 1, 2, 3, 31]) == ()
    assert ahead(TABLE, [*TEXT, 1, 2, 3, 30, 31]) == ()


def test_chances_are_those_of_the_tokens_ahead():
    rows = [OutcomeRow(1, 3, (30, 31), (0.9, 0.5, 0.25)), OutcomeRow(-1, 9, (90, 91), (0.5,))]
    table = OutcomeTable.build(3, IN_FLIGHT, rows)
    assert table.draft_after([*TEXT, 1, 2, 3]) == ((30, 31), (0.5, 0.25))
    assert table.draft_after([*TEXT, 1, 2, 3, 30]) == ((31,), (0.25,))
    assert table.draft_after([*TEXT, 9]) == ((90, 91), ())


def test_before_the_round_ends_the_likeliest_row_is_a_draft():
    assert ahead(TABLE, TEXT) == (1, 2, 3, 30, 31)


class NobodyLooks(list):
    def __getitem__(self, where):
        raise AssertionError(f"looked at {where}")


def test_a_text_that_has_outgrown_a_table_is_not_looked_at():
    assert ahead(TABLE, NobodyLooks([*TEXT, 1, 2, 3, 30, 31])) == ()
    assert ahead(OutcomeTable.build(3, IN_FLIGHT, []), NobodyLooks(TEXT)) == ()


def test_a_text_shorter_than_the_base_finds_nothing():
    assert ahead(TABLE, TEXT[:2]) == ()


@given(
    base=texts,
    path=st.lists(tokens, max_size=3),
    rows=st.lists(st.tuples(st.integers(-1, 2), tokens, st.lists(tokens, max_size=3)), max_size=6),
    committed=texts,
)
def test_never_a_row_whose_text_disagrees(base, path, rows, committed):
    in_flight = DraftTree.chain(path, DraftOrigin.POOL)
    usable = [OutcomeRow(n, b, tuple(d)) for n, b, d in rows if n < len(path)]
    table = OutcomeTable.build(len(base), in_flight, usable)
    draft = ahead(table, [*base, *committed])
    wholes = [[*path[: row.node + 1], row.bonus_token_id, *row.draft_token_ids] for row in usable]
    fitting = [
        tuple(whole[len(committed) :])
        for whole in wholes
        if whole[: len(committed)] == committed and len(whole) > len(committed)
    ]
    assert draft == (fitting[0] if fitting else ())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_shelf_keeps_the_two_newest(bases):
    shelf = TableShelf()
    for base in bases:
        shelf.put(table_of(base, (base,)))
    assert len(shelf) == min(2, len(bases))
    newest = max(bases)
    assert ahead(shelf, [0] * newest) == (newest,)


def test_shelf_falls_back_to_the_older_table():
    shelf = TableShelf()
    shelf.put(table_of(1, (5, 6, 7)))
    shelf.put(table_of(2, (9, 9)))
    assert ahead(shelf, [0, 5, 6]) == (7,)
